// What somebody keeps, and what goes for space: keep, release, --min-free.

import { expect, test } from "bun:test";
import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  statfsSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import {
  events,
  expectRun,
  filesystem,
  pair,
  run,
  s3Remote,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  subvolume,
  subvolumes,
  transfers,
} from "./support/rig.ts";
import { day } from "./support/names.ts";
import { fsidOf, sent } from "./support/wire.ts";

const deleted = (result: Parameters<typeof events>[0]) =>
  events(result)
    .filter(({ event }) => event === "delete")
    .map(({ name }) => name);
const recordIn = (folder: string) => readFileSync(join(folder, ".btrfs-backup.json"), "utf8");
const streamNames = (listed: string) => [
  ...new Set((listed.match(/^\d{8}-\d{6}(?=.*\.btrfs$)/gm) ?? []).toSorted()),
];

test("what is kept stays at a source, in a folder and in stores, with the streams it builds on, until it is released", async () => {
  const { source, snapshots, destination, b } = pair();
  const s3 = await s3Remote();
  const raw = join(b.path, "raw");
  const second = join(filesystem().path, "second");
  const stores = [`raw://${raw}`, s3.url("keep")];
  for (let n = 1; n <= 6; n++) {
    writeFileSync(join(source, "file"), String(n));
    snapshotAs(source, day(n));
  }
  const args = ["-S", "--json", "--full-every", "3", source, destination, ...stores];
  await expectRun(0, args, s3);

  // Nothing complete has that name: the nearest ones are told.
  for (const place of [destination, source, `raw://${raw}`]) {
    const wrong = await expectRun(1, ["keep", place, "20260102-00000"]);
    expect(wrong.stderr).toContain(`no complete snapshot 20260102-00000; near it: ${day(2)}`);
  }
  expect((await expectRun(2, ["keep", destination])).stderr).toContain("give LOCATION and NAME");
  expect((await expectRun(2, ["keep", "shell://cat", day(2)])).stderr).toContain("a command");
  for (const wrong of ["two\nlines", "a\\b", "x".repeat(201), "\u202egnp"])
    await expectRun(2, ["keep", "--note", wrong, destination, day(2)]);
  expect(recordIn(destination)).not.toContain("kept");

  await expectRun(0, ["keep", source, day(1)]);
  await expectRun(0, ["keep", "--note", "first", destination, day(2)]);
  const note = 'before "6.18"';
  const again = await expectRun(0, ["keep", "--json", "--note", note, destination, day(2)]);
  expect(events(again)).toContainEqual(
    expect.objectContaining({ event: "keep", name: day(2), note: 'before "6.18"' }),
  );
  expect(recordIn(destination).match(/"note"/g)?.length).toBe(1);
  for (const store of stores) await expectRun(0, ["keep", "--note", "why", store, day(2)], s3);

  // Each of them says so, to people and to programs.
  const listed = await expectRun(0, ["list", destination, ...stores], s3);
  expect(listed.stdout).toContain('whole, kept (before "6.18")');
  expect(listed.stdout.match(/whole, kept \(why\)/g)?.length).toBe(2);
  const [told] = events(
    await expectRun(0, ["list", "--json", "-n", "1", "-N", "1", source, ...stores], s3),
  );
  const marks = new Map(told?.["snapshots"].map((one: any) => [one.name, one.at]));
  expect(marks.get(day(1))).toMatchObject([{ kept: "", goes: false }, { goes: false }, {}]);
  expect(marks.get(day(2))).toMatchObject([{ goes: true }, { kept: "why" }, { kept: "why" }]);
  expect(marks.get(day(3))).toMatchObject([{ goes: true }, { goes: true }, { goes: true }]);

  // A restored source keeps what it kept.
  await expectRun(0, ["restore", "--replace", source, source]);
  expect(JSON.parse(recordIn(snapshots))[""].kept).toMatchObject([{ name: day(1) }]);

  // A run's retention, with a record that it rewrites, and taken over; a copy is not kept.
  await expectRun(0, ["copy", "--json", destination, second]);
  expect(recordIn(second)).not.toContain("kept");
  writeFileSync(join(source, "file"), "7");
  snapshotAs(source, day(7));
  await expectRun(0, ["-N", "1", "-n", "1", "--adopt", ...args], s3);
  expect(snapshotNames(snapshots)).toEqual([day(1), day(7)]);
  expect(snapshotNames(destination)).toEqual([day(2), day(6), day(7)]); // 6 is shared with the copy
  const inStores = () => [
    streamNames(sh(`ls -1 "$1"`, raw)),
    streamNames(s3.rclone(`rclone lsf "$S/keep"`)),
  ];
  const withKept = [day(1), day(2), day(7)];
  expect(inStores()).toEqual([withKept, withKept]); // 2 builds on 1
  await expectRun(0, ["verify", `raw://${raw}`]);
  expect(recordIn(destination)).toContain("6.18");
  await expectRun(0, ["prune", "-n", "1", destination]);
  for (const store of stores) await expectRun(0, ["prune", "-n", "1", store], s3);
  expect(snapshotNames(destination)).toEqual([day(2), day(6), day(7)]);
  expect(inStores()).toEqual([withKept, withKept]);
  const dry = await expectRun(0, ["prune", "--dry-run", "-n", "1", destination]);
  expect(dry.stderr).toContain(`${day(2)} stays: kept by hand: before "6.18"`);

  // Released, all of it goes; what is not kept is told, and no failure.
  const places = [source, destination, ...stores];
  const nothing = await expectRun(0, ["release", destination, day(7)]);
  expect(nothing.stderr).toContain("is not kept");
  await expectRun(1, ["release", destination, day(30)]);
  for (const place of places)
    await expectRun(0, ["release", place, day(place === source ? 1 : 2)], s3);
  await expectRun(0, ["-N", "1", "-n", "1", ...args], s3);
  expect(snapshotNames(snapshots)).toEqual([day(7)]);
  expect(snapshotNames(destination)).toEqual([day(6), day(7)]);
  expect(inStores()).toEqual([[day(7)], [day(7)]]);
  expect(sh(`ls -1 "$1"`, raw)).not.toContain(".kept");
  expect(s3.rclone(`rclone lsf "$S/keep"`)).not.toContain(".kept");
  expect(recordIn(destination) + recordIn(snapshots)).not.toContain("kept");

  // What is gone is dropped with the next change of the record, and a mark without its stream goes.
  const both = [destination, `raw://${raw}`];
  snapshotAs(source, day(8));
  await expectRun(0, ["-S", source, ...both]);
  for (const place of both) await expectRun(0, ["keep", place, day(8)]);
  sh(
    `btrfs -q subvolume delete "$1/$2" >/dev/null; cd "$3"; rm "$2"*.btrfs "$2"*.sha256`,
    destination,
    day(8),
    raw,
  );
  expect(sh(`ls -A "$1"`, raw)).toContain(".kept");
  await expectRun(0, ["-S", source, ...both]);
  expect(snapshotNames(destination)).toContain(day(8));
  expect(recordIn(destination)).not.toContain("kept");
  expect(sh(`ls -A "$1"`, raw)).not.toContain(".kept");

  // Where the record cannot be read, nothing can be written into it.
  writeFileSync(join(destination, ".btrfs-backup.json"), "{}\n");
  const unreadable = await expectRun(1, ["keep", destination, day(6)]);
  expect(unreadable.stderr).toContain("cannot be read");
  expect(recordIn(destination)).toBe("{}\n");
}, 120_000);

test("a guarded key neither keeps nor releases, nor deletes what is kept, and its runs go on", async () => {
  const { source, b } = pair();
  const { guarded, url } = await sshServer();
  const mine = join(b.path, "mine");
  mkdirSync(mine);
  const [home, raw] = [join(mine, "home"), join(mine, "raw")];
  const places = [url(home), `raw+${url(raw)}`];
  const adds = guarded("--path", mine);
  const deletes = guarded("--path", mine, "--allow-delete", "--allow-read");
  for (let n = 1; n <= 3; n++) {
    writeFileSync(join(source, "file"), String(n));
    snapshotAs(source, day(n));
  }
  await expectRun(0, ["-S", ...adds, source, ...places]);
  const [folder = "", store = ""] = places;
  await expectRun(1, ["keep", ...deletes, folder, day(1)]);
  await expectRun(1, ["keep", ...adds, store, day(1)]);
  expect(sh(`ls -A "$1"`, raw) + recordIn(home)).not.toContain("kept");
  await expectRun(0, ["keep", "--note", "mine", home, day(1)]);
  await expectRun(0, ["keep", "--note", "mine", `raw://${raw}`, day(2)]);
  await expectRun(1, ["release", ...adds, folder, day(1)]);
  await expectRun(1, ["release", ...deletes, store, day(2)]);
  snapshotAs(source, day(4));
  await expectRun(0, ["-S", ...adds, source, ...places]); // it rewrites the record
  await expectRun(0, ["-S", "-n", "1", ...deletes, source, ...places]);
  expect(snapshotNames(home)).toEqual([day(1), day(4)]);
  expect(streamNames(sh(`ls -1 "$1"`, raw))).toEqual([1, 2, 3, 4].map((n) => day(n))); // one chain
  expect((await expectRun(0, ["list", ...deletes, store])).stdout).toContain("kept (mine)");
  expect((await expectRun(0, ["list", ...adds, store])).stdout).toContain("kept");

  // The commands by themselves, as somebody would send them who has the key.
  const key = deletes.find((word) => word.startsWith("IdentityFile=")) ?? "";
  expect(key).not.toBe("");
  const guard = (text: string) =>
    Bun.spawnSync(
      [join(import.meta.dir, "../dist/btrfs-backup"), "guard", "--path", mine, "--allow-delete"],
      {
        env: { ...process.env, SSH_ORIGINAL_COMMAND: text },
      },
    );
  const objects = sh(`ls -1 "$1"`, raw).split("\n");
  const [first = "", second = "", mark = ""] = [
    objects.find((one) => one.startsWith(day(1)) && one.endsWith(".btrfs")),
    objects.find((one) => one.startsWith(day(2)) && one.endsWith(".btrfs")),
    objects.find((one) => one.endsWith(".kept")),
  ];
  const before = [sh(`ls -lA "$1"`, raw), recordIn(home)];
  const id = subvolumes(home).get(day(1))?.id;
  const top = "/mine/home";
  const kept = JSON.parse(recordIn(home))[""];
  const changed = (change: object) => JSON.stringify({ ...kept, ...change });
  const write = (value: string) => sent("record", home, fsidOf(home), '{"/": 1', ',"": ', value);
  for (const text of [
    sent("drop", raw, fsidOf(raw), "", mark),
    sent("drop", raw, fsidOf(raw), "", first),
    sent("drop", raw, fsidOf(raw), "", `${second}.sha256`),
    sent("keep", raw, fsidOf(raw), "", `${first}.kept`, "[]"),
    sent("delete", "", home, fsidOf(home), top, String(id), `./${day(1)}`),
    write(changed({ kept: undefined })),
    write(changed({ kept: [{ ...kept.kept[0], note: "other" }] })),
    write(
      changed({
        kept: [...kept.kept, { ...kept.kept[0], uuid: subvolumes(home).get(day(4))?.receivedUuid }],
      }),
    ),
  ]) {
    const { exitCode, stderr } = guard(text);
    expect([exitCode, stderr.toString()]).toEqual([
      65,
      expect.stringMatching(/kept|keeps|verb keep/),
    ]);
  }
  expect([sh(`ls -lA "$1"`, raw), recordIn(home)]).toEqual(before);
  expect(guard(write(changed({}))).exitCode).toBe(0);
}, 120_000);

/** Snapshots of the first days of a month, each with data of its own, in MiB. */
function fillDays(source: string, days: number, size: number): void {
  for (let n = 1; n <= days; n++) {
    sh(`head -c "$2M" /dev/urandom >"$1/data"`, source, String(size));
    snapshotAs(source, day(n));
  }
}
const freeIn = (path: string) => {
  const { bavail, bsize } = statfsSync(path);
  return bavail * bsize;
};
const MIB = 2 ** 20;

test("--min-free deletes the oldest until there is room: never what is kept, the first of a month, the newest, or what was not served", async () => {
  const { source, destination, b } = pair();
  fillDays(source, 12, 30);
  await expectRun(0, ["-S", source, destination]);
  await expectRun(0, ["keep", destination, day(3)]);
  sh(`btrfs filesystem sync "$1"`, destination);
  const wanted = Math.ceil(freeIn(destination) / MIB) + 50; // two of them make room for it
  const args = ["-S", "--json", "-n", "100 12m", "--min-free", `${wanted}m`, source, destination];

  const dry = await expectRun(0, ["--dry-run", ...args]);
  expect(deleted(dry)).toEqual([day(2)]);
  expect(dry.stderr).toContain("the first, and up to");
  expect(snapshotNames(destination).length).toBe(12);
  const [, , ...options] = args;
  const checked = events(await run(["check", "--json", ...options])).find(({ message }) =>
    message?.startsWith("--min-free"),
  );
  expect(checked).toMatchObject({ level: "warn", about: "space", place: destination });

  // A transfer that fails: nothing goes there.
  snapshotAs(source, day(13));
  mkdirSync(join(destination, day(13)));
  expect(deleted(await expectRun(1, args))).toEqual([]);
  sh(`rmdir "$1"`, join(destination, day(13)));

  const served = await expectRun(0, args);
  expect(deleted(served)).toEqual([day(2), day(4)]); // 1 is the first of its month, 3 is kept
  expect(freeIn(destination)).toBeGreaterThanOrEqual(wanted * MIB);
  expect(served.stderr).toContain(`are free now (--min-free ${wanted}m)`);
  // What went is not sent again, and nothing more goes.
  const next = await expectRun(0, args);
  expect([transfers(next), deleted(next)]).toEqual([[], []]);

  // All that may go does not suffice: it goes, and that is a failure.
  const all = await expectRun(1, [
    "-S",
    "--json",
    "--min-free",
    "99%",
    "--min-keep",
    "6",
    source,
    destination,
  ]);
  expect(deleted(all)).toEqual([1, 5, 6, 7].map((n) => day(n)));
  expect(all.stderr).toContain("the newest 6 stay");
  expect(snapshotNames(destination)).toEqual([3, 8, 9, 10, 11, 12, 13].map((n) => day(n)));

  const beyond = await expectRun(1, ["prune", "--min-free", "2g", "--min-keep", "1", destination]);
  expect(beyond.stderr).toContain("has only");
  expect(snapshotNames(destination).length).toBe(7);

  // Over ssh with a key, which needs --allow-delete for it; and without its source.
  const { guarded, url } = await sshServer();
  const least = Math.ceil(freeIn(destination) / MIB) + 20;
  const words = ["--json", "--min-free", `${least}m`, "--min-keep", "2"];
  const adds = ["-S", ...words, ...guarded("--path", b.path), source, url(destination)];
  expect((await expectRun(1, adds)).stderr).toContain("delete needs --allow-delete");
  expect(snapshotNames(destination).length).toBe(7);
  const deletes = guarded("--path", b.path, "--allow-delete");
  const pruned = await expectRun(0, ["prune", ...words, ...deletes, url(destination)]);
  expect(deleted(pruned)).toEqual([day(8)]);
  expect(freeIn(destination)).toBeGreaterThanOrEqual(least * MIB);
  await expectRun(0, adds);
}, 120_000);

test("--min-free stops when two deletions in turn free next to nothing; of streams, the oldest chain goes from its end", async () => {
  const { source, destination, b } = pair();
  for (let n = 1; n <= 12; n++) snapshotAs(source, day(n));
  await expectRun(0, ["-S", source, destination]);
  const vain = await expectRun(1, ["prune", "--json", "--min-free", "99.5%", destination]);
  expect(deleted(vain)).toEqual([day(1), day(2)]);
  expect(vain.stderr).toContain("freed less than 1 %");
  expect(snapshotNames(destination).length).toBe(10);

  const raw = join(b.path, "raw");
  sh(`btrfs -q subvolume delete "$1"/snapshot/* >/dev/null`, source);
  fillDays(source, 11, 20);
  const args = ["-S", "--full-every", "4", source, `raw://${raw}`];
  await expectRun(0, args);
  sh(`sync -f "$1"`, raw);
  const wanted = Math.ceil(freeIn(raw) / MIB) + 30;
  // Nobody can tell how much is free behind a remote or a command; a folder beside it can.
  for (const place of ["shell://cat >/dev/null", "rclone://nowhere:x"])
    for (const words of [
      ["--min-free", "10%", source, place],
      [source, "--for", place, "--min-free", "10%"],
    ])
      expect((await run(words)).stderr).toContain("--min-free needs a destination");
  for (const words of [
    ["--min-free", "100%"],
    ["--min-free", "0"],
    ["--min-keep", "3"],
    ["--min-free", "1g", "--backfill"],
  ])
    await expectRun(2, [...words, source, destination]);
  await expectRun(2, ["prune", destination]);
  const result = await expectRun(0, [
    "--json",
    "--min-free",
    `${wanted}m`,
    ...args,
    "shell://cat >/dev/null",
  ]);
  expect(deleted(result)).toEqual([day(4), day(3)]);
  await expectRun(0, ["verify", `raw://${raw}`]);
  expect(existsSync(raw)).toBe(true);
  expect(freeIn(raw)).toBeGreaterThanOrEqual(wanted * MIB);
}, 120_000);

test("who has a file open in what was deleted holds nothing up: not --min-free, --sync or the space check; no more goes in its place", async () => {
  const { source, destination, a, b } = pair();
  fillDays(source, 6, 25);
  await expectRun(0, ["-S", source, destination]);
  const other = subvolume(join(b.path, "other"));
  writeFileSync(join(other, "file"), "");
  const opened = [openSync(join(other, "file"), "r")];
  const remove = (path: string) => sh(`btrfs -q subvolume delete "$1" >/dev/null`, path);
  const isLeft = () => sh(`btrfs subvolume list -d "$1"`, b.path);
  remove(other);
  try {
    const lacking = () => `${Math.ceil(freeIn(destination) / MIB) + 20}m`;
    const short = ["--json", "--timeout", "8", "--min-keep", "2"];
    // What others have deleted does not keep our own from going, and being gone.
    const freed = await expectRun(0, ["prune", ...short, "--min-free", lacking(), destination]);
    expect(deleted(freed)).toEqual([day(1)]);
    expect(isLeft().split("\n").length).toBe(1);
    // What we have deleted and is still there: another one would go in vain.
    opened.push(openSync(join(destination, day(2), "data"), "r"));
    const held = await expectRun(1, ["prune", ...short, "--min-free", lacking(), destination]);
    expect(deleted(held)).toEqual([day(2)]);
    expect(held.stderr).toMatch(/1 deleted subvolume \(ID \d+ of .*lsof.*no more is deleted/);
    // A transfer for which there is no space, and one for which room is made.
    sh(`fallocate -l "$2" "$1/ballast"`, b.path, String(freeIn(destination) - 20 * MIB));
    sh(`head -c 40M /dev/urandom >"$1/data"`, source);
    snapshotAs(source, day(7));
    const small = ["-S", "--timeout", "8", "--newest-only", source, destination];
    expect((await expectRun(1, small)).stderr).toContain("--skip-space-check");
    const room = await expectRun(0, ["--make-room", "-n", "1", ...small]);
    expect(snapshotNames(destination)).toEqual([day(7)]);
    expect(room.stderr).toMatch(/2 deleted subvolumes \(IDs \d+, \d+ of/);
    opened.push(openSync(join(source, "snapshot", day(1), "data"), "r"));
    const synced = await expectRun(0, ["-S", "-T", "--sync", "-N", "5", "--timeout", "8", source]);
    expect(synced.stderr).toContain("1 deleted subvolume (ID");
    expect(snapshotNames(join(source, "snapshot")).length).toBe(5);
  } finally {
    for (const one of opened) closeSync(one);
  }
  sh(`btrfs filesystem sync "$1"; btrfs subvolume sync "$1" >/dev/null`, a.path);
}, 120_000);
