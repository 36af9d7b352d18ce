// What is received for a while: files out of stores, paths out of backups, and drills. Nothing of it
// is left, however it ends.

import { expect, test } from "bun:test";
import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  readdirSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import {
  damage,
  events,
  expectRun,
  expectSameTree,
  filesystem,
  gpgKey,
  pair,
  s3Remote,
  sh,
  snapshotAs,
  sshServer,
  start,
  subvolume,
  temporaryDirectory,
  waitFor,
} from "./support/rig.ts";
import { day } from "./support/names.ts";

const scratchIn = (folder: string) =>
  readdirSync(folder).filter((name) => name.startsWith(".btrfs-backup-scratch"));
const streamsIn = (folder: string) =>
  readdirSync(folder)
    .filter((name) => /\.btrfs(\.|$)/.test(name) && !name.endsWith(".sha256"))
    .sort();

/** A source whose file `it` says the day of each of so many snapshots, and which has it not on the last. */
function written(source: string, days: number): void {
  for (let n = 1; n <= days; n++) {
    if (n === days) sh(`rm "$1/it"`, source);
    else writeFileSync(join(source, "it"), `day ${n}\n`);
    snapshotAs(source, day(n));
  }
}

test("the versions of a file in stores, where only they have them, and one of them back", async () => {
  const { source, snapshots } = pair();
  const gpg = gpgKey();
  const folder = temporaryDirectory();
  const store = `raw://${folder}`;
  const it = join(source, "it");
  written(source, 5);
  await expectRun(
    0,
    ["-S", "--compress", "zstd", "--encrypt-to", gpg.recipient, "--full-every", "3", source, store],
    gpg,
  );
  const get = async (args: readonly string[], text: string) => {
    await expectRun(0, ["versions", ...args, "--to", join(source, "back"), it, store], gpg);
    expect(readFileSync(join(source, "back"), "utf8")).toBe(text);
    sh(`rm "$1/back"`, source);
    expect(scratchIn(snapshots)).toEqual([]);
  };
  // All but two are only in the store.
  sh(
    `cd "$1"; btrfs -q subvolume delete "$2" "$3" "$4" >/dev/null`,
    snapshots,
    day(1),
    day(2),
    day(5),
  );
  const seen = await expectRun(0, ["versions", "--json", it, store], gpg);
  expect(
    events(seen)
      .filter(({ event }) => event === "version")
      .map(({ first, state, locations }) => [first, state === null, locations.length]),
  ).toEqual([
    [day(5), true, 1],
    [day(4), false, 2],
    [day(3), false, 2],
    [day(2), false, 1],
    [day(1), false, 1],
  ]);
  expect(scratchIn(snapshots)).toEqual([]);
  await get(["--get", day(1)], "day 1\n");
  await get(["--get", "2026-01-02 12:00"], "day 2\n");
  // What is gone on the fifth day is what it was on the fourth.
  sh(`btrfs -q subvolume delete "$1"/2* >/dev/null`, snapshots);
  await get(["--get", "2026-01-06"], "day 4\n");

  // Without a source to receive beside, and with too little room beside it.
  const scratch = filesystem({ size: "300M" });
  await get(["--scratch", scratch.path, "--get", day(3)], "day 3\n");
  expect(readdirSync(scratch.path)).toEqual([]);
  expect((await expectRun(0, ["versions", join(source, "plain/1"), store], gpg)).stdout).toContain(
    day(5),
  );
  const lost = join(temporaryDirectory(), "gone/it");
  expect((await expectRun(1, ["versions", "--get", day(1), lost, store], gpg)).stderr).toContain(
    "--scratch DIR",
  );

  // A damaged stream is told, and what does not build on it is shown all the same.
  const second = streamsIn(folder)[1] as string;
  sh(`printf x >>"$1/$2"`, folder, second);
  const damaged = await expectRun(1, ["versions", "--json", it, store], gpg);
  expect(damaged.stderr).toContain(second);
  expect(
    events(damaged)
      .filter(({ event }) => event === "version")
      .map(({ first }) => first),
  ).toEqual([day(5), day(4), day(1)]);
  expect(scratchIn(snapshots)).toEqual([]);
});

test("a directory of a backup, of each kind, with all that belongs to it; never what is outside", async () => {
  const { source, destination, a, b } = pair();
  const { options, url } = await sshServer();
  const folder = temporaryDirectory();
  const store = `raw://${folder}`;
  sh(
    `cd "$1"; mkdir -p plain/deep; ln -s /etc "link"; ln -s .. plain/up; mkdir $'odd\\nname'; echo x >$'odd\\nname/it'; mkdir empty/below`,
    source,
  );
  await expectRun(0, [source, destination, store]);
  const target = join(b.path, "back");
  const clear = () => sh(`rm -rf "$1"`, target);
  for (const location of [destination, source, store, url(destination)]) {
    await expectRun(0, ["restore", ...options, "--path", "plain", location, target]);
    expectSameTree(join(source, "plain"), target);
    expect(readdirSync(b.path).sort()).toEqual(["back", "backup"]);
    clear();
    if (location === source) continue;
    // A file, by the path that it has at the source.
    const path = join(source, "plain/5");
    await expectRun(0, ["restore", ...options, "--path", path, location, target]);
    sh(`cmp "$1" "$2"`, path, target);
    if (location === destination)
      expect((await expectRun(1, ["restore", "--path", path, location, target])).stderr).toContain(
        "exists",
      );
    clear();
    if (location === store) continue;
    for (const [wrong, status, why] of [
      ["link/passwd", 1, "no symbolic link"],
      ["plain/up/up/etc/passwd", 1, "no symbolic link"],
      ["nothing", 1, "there is no nothing"],
      ["../../etc", 2, "not below"],
      [".", 2, "all of the backup"],
    ] as const) {
      const { stderr } = await expectRun(status, [
        "restore",
        ...options,
        "--path",
        wrong,
        location,
        target,
      ]);
      expect([wrong, stderr]).toEqual([wrong, expect.stringContaining(why)]);
    }
    expect(readdirSync(b.path)).toEqual(["backup"]);
  }
  expect(
    (await expectRun(1, ["restore", "--path", "link/passwd", store, target])).stderr,
  ).toContain("no symbolic link");
  const prefixed = await expectRun(1, ["restore", "-p", "x-", destination, target]);
  expect(prefixed.stderr).toContain("there are some with another prefix: -p ''");
  // So many bytes a second, also where nothing has to travel.
  const began = Date.now();
  const slowed = ["--rate-limit", "200k", "--path", "plain/deep"];
  await expectRun(0, ["restore", ...slowed, destination, target]);
  expect(Date.now() - began).toBeGreaterThan(1300);
  expectSameTree(join(source, "plain/deep"), target);
  clear();
  // A name with a line break, which no other host is told.
  const odd = ["--path", "odd\nname/../odd\nname"];
  await expectRun(0, ["restore", ...odd, destination, target]);
  expect(readFileSync(join(target, "it"), "utf8")).toBe("x\n");
  clear();
  const refused = await expectRun(1, ["restore", ...options, ...odd, url(destination), target]);
  expect(refused.stderr).toContain("a line break");
  // A link itself is a link.
  await expectRun(0, ["restore", "--path", "link", destination, target]);
  expect(sh(`readlink "$1"`, target)).toBe("/etc");
  clear();
  await expectRun(0, ["restore", "--dry-run", "--path", "plain", store, target]);
  expect(existsSync(target)).toBe(false);
  // To a place that is not btrfs, streams are received elsewhere.
  const other = join(temporaryDirectory(), "back");
  if (sh(`stat -f -c %T "$1"`, folder) !== "btrfs") {
    expect((await expectRun(1, ["restore", "--path", "plain", store, other])).stderr).toContain(
      "--scratch DIR",
    );
    await expectRun(0, ["restore", "--path", "plain/deep", "--scratch", a.path, store, other]);
    expectSameTree(join(source, "plain/deep"), other);
    expect(scratchIn(a.path)).toEqual([]);
  }
  // What was killed while it copied is removed by the next.
  const left = join(b.path, ".btrfs-backup.put-abcdef");
  mkdirSync(join(left, "it"), { recursive: true });
  mkdirSync(join(b.path, ".btrfs-backup.put-foreig"));
  writeFileSync(join(left, ".btrfs-backup.putting"), "");
  await expectRun(0, ["restore", "--path", "plain", destination, target]);
  expect(readdirSync(b.path).sort()).toEqual([".btrfs-backup.put-foreig", "back", "backup"]);
  clear();
  // Nor where a link leads, and whoever can change a folder leads nobody elsewhere, also where the
  // kernel follows links.
  const [tools, elsewhere] = [temporaryDirectory(), temporaryDirectory()];
  const forgetting = `args=(); for one; do args+=("\${one//,nosymfollow/}"); done`;
  writeFileSync(
    join(tools, "mount"),
    `#!/bin/bash\n${forgetting}; exec ${sh("command -v mount")} "\${args[@]}"\n`,
    { mode: 0o755 },
  );
  const env = { PATH: `${tools}:${process.env["PATH"]}` };
  writeFileSync(join(elsewhere, ".btrfs-backup.putting"), "");
  symlinkSync(elsewhere, join(b.path, ".btrfs-backup.put-linked"));
  await expectRun(0, ["restore", "--path", "plain", destination, target], { env });
  expect(readdirSync(elsewhere)).toEqual([".btrfs-backup.putting"]);
  const begun = join(b.path, ".btrfs-backup-scratch.restoring-20260101-000000");
  mkdirSync(begun);
  writeFileSync(join(begun, ".btrfs-backup.restoring"), "");
  for (const [mode, says] of [
    ["1777", `${begun} is not from a restore of this user`],
    ["777", "others can change"],
  ] as const) {
    sh(`chmod "$2" "$1"; chown 1234 "$3"`, b.path, mode, begun);
    const unsafe = await expectRun(1, ["drill", "--scratch", b.path, store], { env });
    expect(unsafe.stderr).toContain(says);
  }
  expect(existsSync(begun)).toBe(true);
});

test("a drill of each kind of place says that all can be restored, and leaves nothing but its time", async () => {
  const { source, snapshots, destination, b } = pair();
  const { url, guarded } = await sshServer();
  const s3 = await s3Remote();
  const folder = temporaryDirectory();
  const store = `raw://${folder}`;
  const spare = filesystem();
  const metrics = join(temporaryDirectory(), "drill.prom");
  written(source, 3);
  await expectRun(0, ["-S", source, destination, store, s3.url("s")], s3);
  const reading = guarded("--path", destination, "--path", folder, "--allow-read");
  const away = ["--scratch", spare.path];
  for (const [location, args, at] of [
    [destination, [], destination],
    [destination, away, spare.path],
    [store, away, spare.path],
    [`raw+${url(folder)}`, [...reading, ...away], spare.path],
    [url(destination), [...reading, ...away], spare.path],
    [s3.url("s"), away, spare.path],
  ] as const) {
    const before = readdirSync(at).sort();
    const done = await expectRun(
      0,
      ["drill", "--json", "--metrics", metrics, ...args, location],
      s3,
    );
    expect(events(done).find(({ event }) => event === "drill")).toMatchObject({
      location,
      name: day(3),
      compared: join(snapshots, day(3)),
    });
    expect(done.stderr).toContain("would take some");
    expect(readdirSync(at).sort()).toEqual(before);
    expect(readFileSync(metrics, "utf8")).toMatch(
      new RegExp(
        `^btrfs_backup_drill_timestamp_seconds\\{source="${source}",destination="${location.replace("+", "\\+")}"\\} 1\\d+`,
        "m",
      ),
    );
  }
  expect(
    readFileSync(metrics, "utf8").match(/^btrfs_backup_drill_success\{.*\} 1$/gm),
  ).toHaveLength(5);
  expect(await expectRun(0, ["drill", "-q", ...away, store])).toMatchObject({
    stdout: "",
    stderr: "",
  });
  await expectRun(0, ["drill", "--random", ...away, store]);
  // Without the original, every byte is read.
  sh(`btrfs -q subvolume delete "$1/$2" >/dev/null`, snapshots, day(1));
  sh(`btrfs -q subvolume delete "$1/$2" >/dev/null`, destination, day(1));
  expect((await expectRun(0, ["drill", "--snapshot", day(1), ...away, store])).stderr).toContain(
    "every file can be read",
  );

  // What is wrong is told, and the time of the last good one stays.
  const good = readFileSync(metrics, "utf8");
  const objects = streamsIn(folder);
  const bytes = (name: string) => statSync(join(folder, name)).size;
  sh(`cp -a "$1" "$1.whole"`, folder);
  for (const [script, why] of [
    [`printf '\\0' | dd of="$1" bs=1 seek=$(($2 / 2)) conv=notrunc 2>/dev/null`, objects[1]],
    [`truncate -s $(($2 - 50)) "$1"`, objects[1]],
    [`rm "$1"`, "is missing"],
  ] as const) {
    const second = objects[1] as string;
    sh(script, join(folder, second), String(bytes(second)));
    const { stderr } = await expectRun(1, ["drill", "--metrics", metrics, ...away, store]);
    expect(stderr).toContain(why as string);
    expect(readdirSync(spare.path)).toEqual([]);
    const now = readFileSync(metrics, "utf8");
    const lineOf = (text: string, name: string) =>
      text
        .split("\n")
        .find(
          (line) => line.startsWith(`btrfs_backup_drill_${name}{`) && line.includes(`"${store}"`),
        );
    expect(lineOf(now, "timestamp_seconds")).toBe(lineOf(good, "timestamp_seconds") as string);
    expect(lineOf(now, "success")).toEndWith(" 0");
    sh(`cp -a "$1.whole/." "$1"`, folder);
  }
  damage(join(destination, day(3)), "echo changed >plain/1");
  for (const args of [[], away])
    expect((await expectRun(1, ["drill", ...args, destination])).stderr).toContain("plain/1");
  expect(scratchIn(destination)).toEqual([]);
  // What makes no sense.
  for (const [args, why] of [
    [[store], "--scratch DIR is missing"],
    [[...away, source], "own snapshots"],
    [["--metrics", join(source, "plain/1"), ...away, store], "other metrics"],
  ] as const)
    expect((await expectRun(2, ["drill", ...args])).stderr).toContain(why);
  expect(readdirSync(b.path)).toEqual(["backup"]);
});

test("Ctrl-C, kill -9 and a full disk leave nothing, or what the next of these commands removes", async () => {
  const { source, snapshots } = pair();
  sh(`head -c 120M /dev/urandom >"$1/large"; echo 1 >"$1/it"`, source);
  snapshotAs(source, day(1));
  const folder = temporaryDirectory();
  const store = `raw://${folder}`;
  await expectRun(0, ["-S", source, store]);
  sh(`btrfs -q subvolume delete "$1"/2* >/dev/null`, snapshots);
  const spare = filesystem();
  const commands = [
    { at: spare.path, args: ["drill", "--scratch", spare.path, store] },
    { at: snapshots, args: ["versions", join(source, "it"), store] },
    { at: spare.path, args: ["restore", "--path", "it", store, join(spare.path, "back")] },
  ];
  // Nobody who has a file open in what was deleted there holds these up.
  const deleted = subvolume(join(spare.path, "deleted"));
  writeFileSync(join(deleted, "file"), "");
  const held = openSync(join(deleted, "file"), "r");
  sh(`btrfs -q subvolume delete "$1" >/dev/null`, deleted);
  const receiving = () => sh(`pgrep -f "$1" || :`, `^btrfs [r]eceive `) !== "";
  for (const { at, args } of commands) {
    const slow = args[0] === "versions" ? args : [...args, "--rate-limit", "40m"];
    const running = start(slow);
    await waitFor("the transfer", receiving);
    if (args[0] === "restore") {
      running.child.kill("SIGINT");
      expect((await running.finished).status).toBe(130);
      expect(scratchIn(at)).toEqual([]);
      continue;
    }
    running.child.kill("SIGKILL");
    await running.finished;
    await waitFor("its children to end", () => !receiving());
    const [left = "none"] = scratchIn(at);
    expect((await expectRun(0, args)).stderr).toContain(left);
    expect(scratchIn(at)).toEqual([]);
  }
  closeSync(held);
  const small = filesystem({ size: "130M", mkfs: ["-m", "single"] });
  const full = await expectRun(1, ["drill", "--scratch", small.path, "--rate-limit", "30m", store]);
  expect(full.stderr).toContain("stopped, since only");
  expect(readdirSync(small.path)).toEqual([]);
  // Beside TARGET only where there is room.
  const tight = filesystem({ size: "320M", mkfs: ["-m", "single"] });
  const asked = await expectRun(1, ["restore", "--path", "it", store, join(tight.path, "back")]);
  expect(asked.stderr).toContain("more than half");
  // A drill that only reflinks needs no room.
  const backup = join(spare.path, "backup");
  await expectRun(0, [source, backup]);
  sh(
    `cd "$1"; n=0; used() { df --output=pcent . | tr -dc 0-9; }; while [ "$(used)" -lt 92 ]; do fallocate -l 10M "full$((n += 1))"; sync -f .; done`,
    spare.path,
  );
  await expectRun(0, ["drill", backup]);
  expect(scratchIn(backup)).toEqual([]);
});
