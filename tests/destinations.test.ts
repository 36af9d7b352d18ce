// The right place, the right owner, and room: what stands between a run and somebody's data.

import { expect, test } from "bun:test";
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import {
  contentsDigest,
  events,
  expectRun,
  expectSound,
  filesystem,
  fill,
  nextSecond,
  pair,
  run,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  subvolumes,
  temporaryDirectory,
  waitFor,
} from "./support/rig.ts";

test("a second source is refused a folder with another's backups, before anything is written, and --adopt takes over", async () => {
  const { source, destination, a } = pair();
  const second = subvolume(join(a.path, "second"));
  await expectRun(0, [source, destination]);
  const [theirs] = snapshotNames(destination) as [string];
  const before = sh(`cd "$1"; ls -A; cat .btrfs-backup.json`, destination);
  await nextSecond();
  const refused = await expectRun(1, ["-n", "1", second, destination]);
  for (const word of [source, second, "-p", "another folder", "--adopt"])
    expect(refused.stderr).toContain(word);
  expect(sh(`cd "$1"; ls -A; cat .btrfs-backup.json`, destination)).toBe(before);
  await expectRun(0, ["-p", "second-", second, destination]);
  await expectRun(0, ["--adopt", "-n", "1", "-S", second, destination]);
  await nextSecond();
  await expectRun(0, ["--adopt", "-n", "1", second, destination]);
  // The other source's backup is a stranger now: never pruned.
  expect(snapshotNames(destination)).toContain(theirs);
  await nextSecond();
  await expectRun(0, ["-n", "1", second, destination]);
  expect(snapshotNames(destination)).toContain(theirs);
  expect(snapshotNames(destination).length).toBe(2);
  expect((await expectRun(1, [source, destination])).stderr).toContain("belong to");
  // It is whole, and can be given back.
  const { stdout } = await expectRun(0, ["list", destination]);
  expect(stdout).toMatch(new RegExp(`^${theirs}  .*  foreign\n.*  whole\n`, "m"));
  const back = join(a.path, "back");
  await expectRun(0, ["restore", "-p", "", "--snapshot", theirs, destination, back]);
  expect(contentsDigest(back)).toBe(contentsDigest(join(destination, theirs)));
});

test("a snapshot folder outside of its source has one owner as well", async () => {
  const { source, a } = pair();
  const folder = join(a.path, "snapshots");
  const second = subvolume(join(a.path, "second"));
  await expectRun(0, ["-f", folder, source]);
  expect((await expectRun(1, ["-f", folder, "-N", "1", second])).stderr).toContain("belong to");
  await expectRun(0, ["-f", folder, "-p", "second-", second]);
  await nextSecond();
  await expectRun(0, ["-f", folder, source]);
  expect(snapshotNames(folder).length).toBe(2);
});

test("a source that was rolled back to a snapshot goes on incrementally, and the record follows it", async () => {
  const { source, snapshots, destination } = pair();
  await expectRun(0, [source, destination]);
  const [name] = snapshotNames(snapshots) as [string];
  // As one rolls back by hand: the old subvolume goes aside, its snapshot takes its place, the snapshots move over.
  sh(
    `mv "$1" "$1.old"; btrfs -q subvolume snapshot "$1.old/snapshot/$2" "$1" >/dev/null; rm -rf "$1/snapshot"; mkdir "$1/snapshot"
    btrfs property set -ts "$1.old/snapshot/$2" ro false; mv "$1.old/snapshot/$2" "$1/snapshot/$2"; btrfs property set -ts "$1/snapshot/$2" ro true; cp "$1.old/snapshot/.btrfs-backup.json" "$1/snapshot"`,
    source,
    name,
  );
  await nextSecond();
  const result = await expectRun(0, ["--json", source, destination]);
  expect(events(result).find(({ event }) => event === "transfer")).toMatchObject({ parent: name });
  expect(readFileSync(join(destination, ".btrfs-backup.json"), "utf8")).toContain(
    sh(`btrfs subvolume show "$1" | awk '/^\\tUUID/ { print $2 }'`, source),
  );
  expectSound(destination, snapshots);
});

test("an unmounted destination is refused, not filled; its mount point stays empty", async () => {
  const { source, snapshots, b } = pair();
  await expectRun(0, [source, b.path]);
  const [pin] = snapshotNames(snapshots) as [string];
  sh(`umount "$1"`, b.path);
  await nextSecond();
  const result = await expectRun(1, ["-N", "1", source, b.path]);
  expect(result.stderr).toContain("is the disk mounted?");
  expect(readdirSync(b.path)).toEqual([]);
  expect(snapshotNames(snapshots)).toContain(pin);
});

test("another disk in the same place is refused until --adopt", async () => {
  const { source, b } = pair();
  const destination = b.path;
  await expectRun(0, [source, destination]);
  sh(
    `umount "$1"; truncate -s 0 "$2"; truncate -s 1G "$2"; mkfs.btrfs -q "$2" >/dev/null 2>&1; mount -o loop "$2" "$1"`,
    b.path,
    b.image,
  );
  await nextSecond();
  expect((await expectRun(1, [source, destination])).stderr).toContain("another filesystem");
  expect(readdirSync(destination)).toEqual([]);
  await expectRun(0, ["--adopt", source, destination]);
  expect(snapshotNames(destination).length).toBeGreaterThan(0);
  await nextSecond();
  await expectRun(0, [source, destination]);
});

test("a destination whose record is gone, and one with its folder gone, are refused until --adopt", async () => {
  const { source, destination } = pair();
  await expectRun(0, [source, destination]);
  rmSync(join(destination, ".btrfs-backup.json"));
  await nextSecond();
  expect((await expectRun(1, [source, destination])).stderr).toContain("--adopt");
  await expectRun(0, ["--adopt", source, destination]);
  sh(`btrfs subvolume delete "$1"/2* >/dev/null; rm -r "$1"`, destination);
  expect((await expectRun(1, ["-S", source, destination])).stderr).toContain(
    "is the disk mounted?",
  );
  expect(existsSync(destination)).toBe(false);
  await expectRun(0, ["-S", "--adopt", source, destination]);
});

test("SOURCE's own filesystem is refused, and allowed with --skip-fs-checks", async () => {
  const { source, a } = pair();
  const destination = join(a.path, "here");
  expect((await expectRun(1, [source, destination])).stderr).toContain("--skip-fs-checks");
  expect(existsSync(destination)).toBe(false);
  await expectRun(0, ["--skip-fs-checks", source, destination]);
  expect(snapshotNames(destination).length).toBe(1);
});

test("a destination in, at or above the snapshot folder is a usage error, by whatever path", async () => {
  const { source, snapshots, a } = pair();
  const link = join(temporaryDirectory(), "link");
  sh(`ln -s "$1" "$2"`, a.path, link);
  for (const place of [
    snapshots,
    join(snapshots, "x"),
    source,
    a.path,
    join(link, "home/snapshot"),
  ]) {
    const result = await run([source, place]);
    expect([place, result.status, result.stderr]).toEqual([
      place,
      2,
      expect.stringContaining("snapshot folder"),
    ]);
    expect(existsSync(snapshots) && snapshotNames(snapshots).length > 0).toBe(false);
    sh(`rm -rf "$1"`, snapshots);
  }
});

test("a destination below a bind mount of a plain folder is refused by its real name; below a mounted subvolume it works", async () => {
  const { source, b } = pair();
  const [bound, mounted] = [temporaryDirectory(), temporaryDirectory()];
  mkdirSync(join(b.path, "folder"));
  subvolume(join(b.path, "vault"));
  sh(
    `mount --bind "$1/folder" "$2"; mount -o subvol=vault "$(findmnt -no SOURCE "$1")" "$3"`,
    b.path,
    bound,
    mounted,
  );
  const refused = await expectRun(1, [source, join(bound, "backup")]);
  expect(refused.stderr).toContain("bind mount of the plain folder /folder");
  await expectRun(0, [source, join(mounted, "backup")]);
  await nextSecond();
  await expectRun(0, [source, join(mounted, "backup")]);
  expectSound(join(mounted, "backup"), join(source, "snapshot"));
  expect(snapshotNames(join(b.path, "vault/backup")).length).toBe(2);
  sh(`umount "$1" "$2"`, bound, mounted);
});

test("a destination is made where it can be one, and nowhere else", async () => {
  const { source, b } = pair();
  const plain = temporaryDirectory();
  expect((await expectRun(1, [source, join(plain, "no/such")])).stderr).toContain(
    "no such directory",
  );
  expect(readdirSync(plain)).toEqual([]);
  writeFileSync(join(b.path, "file"), "");
  expect((await expectRun(1, ["-S", source, join(b.path, "file")])).stderr).toContain(
    "not a directory",
  );
  expect((await expectRun(1, ["-S", source, join(b.path, "file/below/it")])).stderr).toContain(
    "[error]",
  );
  expect(readdirSync(b.path)).toEqual(["file"]);
  expect((await expectRun(1, ["-S", source, plain])).stderr).toContain("not on btrfs");
});

test("an optional destination may be away, until it has been for longer than --max-age", async () => {
  const { source, snapshots, destination, b } = pair();
  const at = ["--optional", destination];
  await expectRun(0, [source, ...at]);
  const [pin] = snapshotNames(snapshots) as [string];
  sh(`umount "$1"`, b.path);
  await nextSecond();
  const away = await expectRun(0, ["--json", "--max-age", "3d", "-N", "1", source, ...at]);
  expect(events(away)).toContainEqual({
    event: "skipped",
    destination,
    message: expect.any(String),
  });
  expect(away.stderr).not.toContain("[error]");
  expect(snapshotNames(snapshots)).toContain(pin);
  // Four days ago, says the record now.
  const record = join(snapshots, ".btrfs-backup.json");
  writeFileSync(
    record,
    readFileSync(record, "utf8").replace(
      /"last":"[^"]*"/,
      `"last":"${new Date(Date.now() - 4 * 86400e3).toISOString()}"`,
    ),
  );
  expect((await expectRun(1, ["--max-age", "3d", "-S", source, ...at])).stderr).toContain(
    "longer ago than 3d",
  );
  await expectRun(0, ["--max-age", "5d", "-S", source, ...at]);
  expect((await expectRun(0, ["-S", source, "--optional", "/nowhere/at/all"])).stderr).toContain(
    "Skipping",
  );
});

test("what an absent destination would still want is kept for it with --keep-unsent", async () => {
  const { source, snapshots, destination, b } = pair();
  snapshotAs(source, "20260101-000000");
  await expectRun(0, ["-S", source, destination]);
  sh(`umount "$1"`, b.path);
  for (const day of [2, 3, 4]) snapshotAs(source, `2026010${day}-000000`);
  await expectRun(0, [
    "-S",
    "-N",
    "1",
    "-n",
    "2",
    "--keep-unsent",
    source,
    "--optional",
    destination,
  ]);
  expect(snapshotNames(snapshots)).toEqual([
    "20260101-000000",
    "20260103-000000",
    "20260104-000000",
  ]);
  sh(`mount -o loop "$1" "$2"`, b.image, b.path);
  await expectRun(0, ["-S", "-N", "1", "-n", "2", "--keep-unsent", source, destination]);
  expect(snapshotNames(destination)).toEqual(["20260103-000000", "20260104-000000"]);
  expect(snapshotNames(snapshots)).toEqual(["20260104-000000"]);
});

test("nothing is deleted at the source while a given destination has no pin and cannot be read", async () => {
  const { source, snapshots } = pair();
  for (const day of [1, 2, 3]) snapshotAs(source, `2026010${day}-000000`);
  await expectRun(1, ["-S", "-N", "1", source, "/nowhere/at/all"]);
  expect(snapshotNames(snapshots).length).toBe(3);
  await expectRun(0, ["-S", "-N", "1", source]);
  expect(snapshotNames(snapshots).length).toBe(1);
});

test("a full destination fails alone, deletes nothing, and --make-room lets go first what goes anyway", async () => {
  const source = subvolume(join(filesystem().path, "home"));
  const small = filesystem({ size: "320M" });
  const destination = join(small.path, "backup");
  const snapshots = join(source, "snapshot");
  for (const day of [1, 2, 3]) {
    sh(`head -c 60M /dev/urandom >"$1/large"`, source);
    snapshotAs(source, `2026010${day}-000000`);
    await expectRun(0, ["-S", source, destination]);
  }
  sh(`head -c 90M /dev/urandom >"$1/large"`, source);
  snapshotAs(source, "20260104-000000");
  const args = ["-S", "-n", "1", source, destination];
  expect((await expectRun(1, args)).stderr).toContain("are free there");
  const full = await expectRun(1, ["--skip-space-check", ...args]);
  expect(full.stderr).toContain("No space left on device");
  expect(snapshotNames(destination)).toEqual([
    "20260101-000000",
    "20260102-000000",
    "20260103-000000",
  ]);
  expectSound(destination, snapshots);
  const room = await expectRun(0, ["-S", "-n", "1", "--make-room", "--json", source, destination]);
  expect(
    events(room)
      .filter(({ event }) => event === "transfer" || event === "delete")
      .map(({ event, name, reason }) => [event, name, reason]),
  ).toEqual([
    ["delete", "20260101-000000", "to make room"],
    ["delete", "20260102-000000", "to make room"],
    ["transfer", "20260104-000000", undefined],
    ["delete", "20260103-000000", 'not kept by "1"'],
  ]);
  expect(snapshotNames(destination)).toEqual(["20260104-000000"]);
  expectSound(destination, snapshots);
});

test("a read-only destination is an error of its own", async () => {
  const { source, destination, b } = pair();
  const other = filesystem();
  await expectRun(0, [source, destination]);
  sh(`mount -o remount,ro "$1"`, b.path);
  await nextSecond();
  const result = await expectRun(1, [source, destination, join(other.path, "x")]);
  expect(result.stderr).toContain("Read-only file system");
  expect(snapshotNames(join(other.path, "x")).length).toBe(2);
});

test("a name that is taken at the destination is a conflict: reported, left alone, and nothing is pruned there", async () => {
  const { source, destination } = pair();
  for (const day of [1, 2, 3, 4, 5]) snapshotAs(source, `2026010${day}-000000`);
  await expectRun(0, ["-S", source, destination]);
  // A backup made writable, a writable one of nobody's, a plain directory.
  sh(
    `cd "$1"; btrfs property set -f -ts 20260102-000000 ro false; echo mine >20260102-000000/mine
    btrfs -q subvolume delete 20260103-000000 20260104-000000 >/dev/null; btrfs -q subvolume create 20260103-000000 >/dev/null; echo mine >20260103-000000/mine; mkdir 20260104-000000; echo mine >20260104-000000/mine`,
    destination,
  );
  const result = await expectRun(1, ["-S", "-n", "4", source, destination]);
  for (const name of ["20260102-000000", "20260103-000000", "20260104-000000"]) {
    expect(result.stderr).toContain(`${name} is not sent`);
    expect(readFileSync(join(destination, name, "mine"), "utf8")).toBe("mine\n");
  }
  expect([...subvolumes(destination).keys()]).toContain("20260101-000000");
});

test("a source and destination last used by 0.3.1 continue incrementally", async () => {
  const { source, snapshots, destination } = pair();
  mkdirSync(destination);
  for (const day of [1, 2]) snapshotAs(source, `2026010${day}-000000`);
  sh(
    `btrfs send -q "$1/20260101-000000" | btrfs receive -q "$2"; btrfs send -q -p "$1/20260101-000000" "$1/20260102-000000" | btrfs receive -q "$2"`,
    snapshots,
    destination,
  );
  // A third was being sent when the power failed: half of it is there, and noted.
  sh(`head -c 3M /dev/urandom >"$1/new"`, source);
  snapshotAs(source, "20260103-000000");
  sh(
    `btrfs send -q -p "$1/20260102-000000" "$1/20260103-000000" | head -c 2000000 | btrfs receive -q "$2" 2>/dev/null || :`,
    snapshots,
    destination,
  );
  const old = JSON.stringify({
    "20260103-000000": { locks: [destination] },
    "20260102-000000": { parent_locks: [destination] },
    "20260101-000000": { locks: ["/mnt/usb"] },
  });
  writeFileSync(join(snapshots, ".outstanding_transfers"), old);
  const result = await expectRun(0, ["-S", "--json", source, destination]);
  expect(events(result).filter(({ event }) => event === "transfer")).toMatchObject([
    { name: "20260103-000000", parent: "20260102-000000" },
  ]);
  expect(readFileSync(join(snapshots, ".outstanding_transfers"), "utf8")).toBe(old);
  expectSound(destination, snapshots);
  expect(snapshotNames(destination).length).toBe(3);
});

test("0.3.1's known destinations keep their pins, and an empty place is not taken for one of them", async () => {
  const { source, snapshots, destination, b } = pair();
  for (const day of [1, 2, 3]) snapshotAs(source, `2026010${day}-000000`);
  writeFileSync(
    join(snapshots, ".outstanding_transfers"),
    JSON.stringify({ "20260101-000000": { parent_locks: [destination] } }),
  );
  await expectRun(0, ["-S", "-N", "1", source]);
  expect(snapshotNames(snapshots)).toEqual(["20260101-000000", "20260103-000000"]);
  mkdirSync(destination);
  expect((await expectRun(1, ["-S", source, destination])).stderr).toContain("--adopt");
  expect(readdirSync(b.path + "/backup")).toEqual([]);
  await expectRun(0, ["-S", "--locked-dests", "--adopt", source]);
  expect(snapshotNames(destination)).toEqual(["20260101-000000", "20260103-000000"]);
});

test("a folder in which 0.3.1 mixed two sources is taken over without pruning the other's", async () => {
  const { source, snapshots, destination, a } = pair();
  const second = subvolume(join(a.path, "second"));
  fill(second, 2);
  mkdirSync(destination);
  const send = (folder: string, name: string, parent?: string) =>
    sh(
      `btrfs send -q \${3:+-p "$1/$3"} "$1/$2" | btrfs receive -q "$4"`,
      folder,
      name,
      parent ?? "",
      destination,
    );
  for (const [at, name] of [
    [source, "20260101-000000"],
    [second, "20260101-120000"],
    [source, "20260102-000000"],
    [second, "20260102-120000"],
  ] as const)
    snapshotAs(at, name);
  send(snapshots, "20260101-000000");
  send(join(second, "snapshot"), "20260101-120000");
  send(snapshots, "20260102-000000", "20260101-000000");
  send(join(second, "snapshot"), "20260102-120000", "20260101-120000");
  sh(`btrfs subvolume delete "$1/20260101-000000" >/dev/null`, snapshots); // known through its child alone
  await expectRun(0, ["-n", "1", source, destination]);
  const left = snapshotNames(destination);
  expect(left).toContain("20260101-120000");
  expect(left).toContain("20260102-120000");
  expect(left.length).toBe(3);
  expect((await expectRun(1, [second, destination])).stderr).toContain("belong to");
});

test("a snapshot folder that 0.3.1 let two sources share is taken over without touching the other's snapshots", async () => {
  const { source, destination, a } = pair();
  const folder = join(a.path, "snapshots");
  mkdirSync(folder);
  const second = subvolume(join(a.path, "second"));
  for (const day of [1, 2, 3])
    sh(
      `btrfs -q subvolume snapshot -r "$1" "$2" >/dev/null`,
      second,
      join(folder, `2026010${day}-000000`),
    );
  sh(
    `btrfs -q subvolume snapshot -r "$1" "$2" >/dev/null`,
    source,
    join(folder, "20260104-000000"),
  );
  for (let i = 0; i < 2; i++) {
    await expectRun(0, ["-N", "1", "-f", folder, source, destination]);
    await nextSecond();
  }
  expect(snapshotNames(folder).length).toBe(4);
  expect(snapshotNames(folder)).toContain("20260101-000000");
  expect(snapshotNames(destination)).not.toContain("20260101-000000");
});

test("another disk that is mounted in mid-run at a destination is neither written to nor pruned", async () => {
  const { source, destination } = pair();
  const [one, other] = [filesystem(), filesystem()];
  for (const day of [1, 2, 3]) snapshotAs(source, `2026010${day}-000000`);
  for (const disk of [one, other]) {
    if (disk === other) sh(`umount "$1"; mount -o loop "$2" "$1"`, one.path, other.image);
    await expectRun(0, ["-S", "--adopt", source, one.path]);
  }
  sh(`umount "$1"; mount -o loop "$2" "$1"`, one.path, one.image);
  await expectRun(0, ["-S", "--adopt", source, one.path]);
  const gate = join(temporaryDirectory(), "gate");
  snapshotAs(source, "20260104-000000");
  const hook = `touch ${gate}; while [ -e ${gate} ]; do sleep 0.05; done`;
  const running = start(["-n", "1", "--after-snapshot", hook, source, destination, one.path]);
  await waitFor("the run to be between opening and sending", () => existsSync(gate));
  sh(`umount -l "$1"; mount -o loop "$2" "$1"`, one.path, other.image);
  const before = sh(`ls -A "$1"; cat "$1/.btrfs-backup.json"`, one.path);
  rmSync(gate);
  const result = await running.finished;
  expect([result.status, result.stderr]).toEqual([
    1,
    expect.stringContaining("another filesystem or directory is at"),
  ]);
  expect(sh(`ls -A "$1"; cat "$1/.btrfs-backup.json"`, one.path)).toBe(before);
  expect(snapshotNames(destination).length).toBe(1);
});

test("a user's subvolume with a line break in its name cannot pass for a snapshot", async () => {
  const { source, snapshots, destination, a } = pair();
  await expectRun(0, [source, destination]);
  const [name] = snapshotNames(snapshots) as [string];
  const lines = [
    `x\nID 1 gen 1 boo`,
    `y\nID 9999 gen 1 cgen 1 top level 5 parent_uuid - received_uuid - uuid 11111111-1111-1111-1111-111111111111 path home`,
  ];
  sh(`btrfs -q subvolume create "$1/$2" >/dev/null`, a.path, lines[0] as string);
  await nextSecond();
  await expectRun(0, [source, destination]);
  sh(
    `mkdir -p "$1/$2/snapshot"; btrfs -q subvolume create "$1/$2/snapshot/$3" >/dev/null`,
    a.path,
    lines[1] as string,
    name,
  );
  const result = await expectRun(1, ["-S", "-N", "1", source, destination]);
  expect(result.stderr).toContain("line break");
  expect(snapshotNames(snapshots).length).toBe(2);
});

test("a takeover that sends nothing is remembered on both sides", async () => {
  const { source, snapshots, destination } = pair();
  mkdirSync(destination);
  snapshotAs(source, "20260101-000000");
  sh(`btrfs send -q "$1/20260101-000000" | btrfs receive -q "$2"`, snapshots, destination);
  await expectRun(0, ["-S", source, destination]);
  await nextSecond();
  await expectRun(0, [source, destination]);
});

test("--remove-locks forgets pins, not which disk it was", async () => {
  const { source, b } = pair();
  await expectRun(0, [source, b.path]);
  sh(
    `umount "$1"; truncate -s 0 "$2"; truncate -s 1G "$2"; mkfs.btrfs -q "$2" >/dev/null 2>&1; mount -o loop "$2" "$1"`,
    b.path,
    b.image,
  );
  await nextSecond();
  expect((await expectRun(1, ["--remove-locks", source, b.path])).stderr).toContain(
    "another filesystem",
  );
});

test("a chain that ends in a folder goes on although that folder begins another", async () => {
  const { source, destination, b } = pair();
  const third = join(filesystem().path, "third");
  await expectRun(0, [source, destination]);
  await expectRun(0, ["-S", "-f", destination, b.path, third]);
  await nextSecond();
  await expectRun(0, [source, destination]);
  expect(snapshotNames(third).length).toBe(1);
});

test("a source that adopts back what was its own prunes it again", async () => {
  const { source, destination, a } = pair();
  const second = subvolume(join(a.path, "second"));
  for (const day of [1, 2]) snapshotAs(source, `2026010${day}-000000`);
  await expectRun(0, ["-S", source, destination]);
  await expectRun(0, ["--adopt", second, destination]);
  await nextSecond();
  await expectRun(0, ["--adopt", "-n", "1", source, destination]);
  expect(snapshotNames(destination)).not.toContain("20260101-000000");
  expect(snapshotNames(destination).length).toBe(2); // and the stranger
});

test("where nobody else's backup is left, no stranger is on record", async () => {
  const { source, destination, a } = pair();
  const record = () => readFileSync(join(destination, ".btrfs-backup.json"), "utf8");
  snapshotAs(source, "20260101-000000");
  await expectRun(0, ["-S", source, destination]);
  await expectRun(0, ["--adopt", "-S", subvolume(join(a.path, "second")), destination]);
  expect(record()).toContain("strangers");
  await expectRun(0, ["--adopt", "-S", source, destination]);
  expect(record()).not.toContain("strangers");
});

test("however many strangers there are, they stay, and the record of them is small", async () => {
  const { source, destination, a } = pair();
  const second = subvolume(join(a.path, "second"));
  snapshotAs(source, "20260101-000000");
  await expectRun(0, ["-S", source, destination]);
  const many = 2500;
  // By the ioctl of linux/btrfs.h, since so many processes would take minutes.
  sh(
    `cd "$1"; perl -MPOSIX -e 'sub dir { open(my $d, "<", $_[0]) or die; $d } my ($s, $in) = (dir("20260101-000000"), dir("."));
    for my $i (1 .. ${many}) { ioctl($in, 0x50009417, pack("q Q Q x32 a4040", fileno($s), 0, 2, strftime("%Y%m%d-%H%M%S", gmtime(1262304000 + 3600 * $i)))) or die "$!" }'`,
    destination,
  );
  snapshotAs(second, "20260102-000000");
  for (const _ of [1, 2]) {
    await expectRun(0, ["--adopt", "-n", "1", "-S", second, destination]);
    expect(statSync(join(destination, ".btrfs-backup.json")).size).toBeLessThan(1000);
  }
  snapshotAs(second, "20260103-000000");
  await expectRun(0, ["-n", "1", "-S", second, destination]);
  const standing = () => readdirSync(destination).filter((name) => /^\d{8}-\d{6}$/.test(name));
  const names = standing();
  expect([
    names.length,
    names.includes("20260102-000000"),
    names.includes("20260103-000000"),
  ]).toEqual([many + 2, false, true]);
  await expectRun(0, ["prune", "-n", "1", destination]);
  expect(standing().length).toBe(many + 2);
  expect((await expectRun(1, ["-S", source, destination])).stderr).toContain("belong to");
});

test("a fifo or link in the place of a file of ours is refused, and holds nobody up", async () => {
  const { source, destination } = pair();
  await expectRun(0, [source, destination]);
  for (const name of [".btrfs-backup..lock", ".btrfs-backup..receiving", ".btrfs-backup.json"])
    for (const make of ["mkfifo", "ln -s /etc/passwd"]) {
      sh(`mv "$1/$2" "$1/saved"; ${make} "$1/$2"`, destination, name);
      expect((await expectRun(1, ["-S", source, destination])).stderr).toContain(
        "is not a plain file",
      );
      sh(`mv -f "$1/saved" "$1/$2"`, destination, name);
    }
  await expectRun(0, ["-S", source, destination]);
});

test("known destinations are not taken from a record that another user could have written", async () => {
  const { source, snapshots } = pair();
  await expectRun(0, [source]);
  const proof = join(temporaryDirectory(), "proof");
  writeFileSync(
    join(snapshots, ".outstanding_transfers"),
    JSON.stringify({
      [snapshotNames(snapshots)[0] as string]: {
        locks: [`shell://touch ${proof}; cat >/dev/null`],
      },
    }),
  );
  sh(`chown 4711 "$1"`, join(snapshots, ".outstanding_transfers"));
  expect((await expectRun(1, ["-S", "--locked-dests", source])).stderr).toContain(
    "belongs to another user",
  );
  expect(existsSync(proof)).toBe(false);
});

test("destinations are opened side by side; each of one host uses the first one's connection", async () => {
  const { source, b } = pair();
  const { options, url } = await sshServer();
  const tools = temporaryDirectory();
  // Nobody goes on before all three are there, but for the source, which comes first.
  writeFileSync(
    join(tools, "flock"),
    `#!/bin/bash\nif [ "$1" = -V ] && [ -e ${tools}/go ]; then : >"${tools}/here-$$"; for i in {1..400}; do [ "$(ls ${tools} | grep -c here)" -ge 3 ] && break; sleep 0.05; [ $i -lt 400 ] || exit 1; done; fi\n[ "$1" != -V ] || : >${tools}/go\nexec ${sh("command -v flock")} "$@"\n`,
    { mode: 0o755 },
  );
  const places = ["x", "y", "z"].map((name) => join(b.path, name));
  for (const place of places) mkdirSync(place);
  await expectRun(0, ["-q", "--dry-run", source, ...places], {
    env: { PATH: `${tools}:${process.env["PATH"]}` },
  });
  // One connection for all.
  const watched = temporaryDirectory();
  writeFileSync(
    join(watched, "ssh"),
    `#!/bin/bash\nexec ${sh("command -v ssh")} -v "$@" 2> >(tee -a ${watched}/log >&2)\n`,
    { mode: 0o755 },
  );
  const ssh = ["-q", ...options, source, ...places.map((place) => url(place))];
  await expectRun(0, ssh); // the folders' locks are made
  await expectRun(0, [...ssh, "-S"], { env: { PATH: `${watched}:${process.env["PATH"]}` } });
  expect(readFileSync(join(watched, "log"), "utf8").match(/Authenticated to/g)?.length).toBe(1);
  for (const place of places) expect(snapshotNames(place).length).toBe(1);
});

test("a cloned machine does not take the original's chain: its backups are neither added to nor pruned", async () => {
  const { source, snapshots, destination } = pair();
  for (const n of [1, 2, 3]) snapshotAs(source, `2026010${n}-000000`);
  await expectRun(0, ["-S", source, destination]);
  // The clone was made after the second snapshot, and is another host with the same subvolume.
  sh(
    `btrfs -q subvolume delete "$1/20260103-000000"; sed -i 's/"host":"[^"]*"/"host":"original"/' "$2/.btrfs-backup.json"`,
    snapshots,
    destination,
  );
  const record = readFileSync(join(destination, ".btrfs-backup.json"), "utf8");
  const refused = await expectRun(1, ["-n", "1", source, destination]);
  expect(refused.stderr).toMatch(/made on original:.*newest, 20260103-000000, is unknown.*clone/);
  expect([
    snapshotNames(destination),
    readFileSync(join(destination, ".btrfs-backup.json"), "utf8"),
  ]).toEqual([["20260101-000000", "20260102-000000", "20260103-000000"], record]);
  await nextSecond();
  await expectRun(0, ["--adopt", "-n", "1", source, destination]);
  expect(snapshotNames(destination)).toContain("20260103-000000");
  // A machine that was only renamed goes on.
  sh(`sed -i 's/"host":"[^"]*"/"host":"before"/' "$1/.btrfs-backup.json"`, destination);
  await nextSecond();
  expect((await expectRun(0, [source, destination])).stderr).toContain(
    "its backups were made on before:",
  );
});
