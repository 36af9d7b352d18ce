// The main job: snapshot, send the difference, keep what should be kept.

import { expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  events,
  expectRun,
  expectSameTree,
  expectSound,
  filesystem,
  fill,
  nextSecond,
  pair,
  ROOT,
  run,
  sh,
  snapshotAs,
  snapshotNames,
  start,
  subvolume,
  subvolumes,
  temporaryDirectory,
  unmount,
  waitFor,
} from "./support/rig.ts";

/** A `btrfs` first on the PATH that notes what it is called with. */
function countingBtrfs(): { env: Record<string, string>; calls: () => string[] } {
  const directory = temporaryDirectory();
  writeFileSync(
    join(directory, "btrfs"),
    `#!/bin/sh\necho "$1 $2" >>${directory}/calls\nexec ${sh("command -v btrfs")} "$@"\n`,
    { mode: 0o755 },
  );
  return {
    env: { PATH: `${directory}:${process.env["PATH"]}` },
    calls: () => readFileSync(join(directory, "calls"), "utf8").trim().split("\n"),
  };
}

test("a second run of a 1 GiB source sends only the difference, and both backups are the snapshots", async () => {
  const [a, b] = [filesystem({ size: "4G" }), filesystem({ size: "4G" })];
  const source = subvolume(join(a.path, "home"));
  const backups = join(b.path, "backup");
  fill(source);
  sh(`head -c 1G /dev/urandom >"$1/large"`, source);
  const first = events(await expectRun(0, ["--json", source, backups]));
  expect(first.find(({ event }) => event === "transfer")).toMatchObject({ parent: null });
  sh(`head -c 1M /dev/urandom | dd of="$1/large" bs=1M seek=500 conv=notrunc 2>/dev/null`, source);
  await nextSecond();
  const second = events(await expectRun(0, ["--json", source, backups]));
  const transfer = second.find(({ event }) => event === "transfer");
  const [old, young] = snapshotNames(backups);
  expect(transfer).toMatchObject({ parent: old, name: young });
  expect(transfer?.["bytes"]).toBeLessThan(3 << 20);
  // The measured figure is the stream's own size, and a line that the stage's shell asks for.
  const size = Number(
    sh(
      `btrfs send -q --proto 2 --compressed-data -p "$1/$2" "$1/$3" | wc -c`,
      join(source, "snapshot"),
      old ?? "",
      young ?? "",
    ),
  );
  expect((transfer?.["bytes"] as number) - size).toBeWithin(0, 64);
  expect(snapshotNames(join(source, "snapshot"))).toEqual([old as string, young as string]);
  expectSound(backups, join(source, "snapshot"));
  console.log(`the second stream: ${transfer?.["bytes"]} bytes`);
});

test("without a destination, a read-only snapshot is taken, of what the source was", async () => {
  const { source, snapshots } = pair();
  await expectRun(0, [source]);
  const [[name, snapshot] = ["", null]] = [...subvolumes(snapshots)];
  expect(snapshot).toMatchObject({ readonly: true, receivedUuid: null });
  expectSameTree(join(source, "plain"), join(snapshots, name, "plain"));
  expectSameTree(join(source, "odd names"), join(snapshots, name, "odd names"));
});

test("first runs that meet do not stand in each other's way", async () => {
  const { source, snapshots } = pair();
  for (let round = 0; round < 5; round++) {
    const args = ["-S", "--wait", "30", "-f", `snapshot-${round}`, source];
    await Promise.all([1, 2, 3, 4].map(() => expectRun(0, args)));
  }
  expect(existsSync(snapshots)).toBe(false);
});

test("two snapshots within one second get two names", async () => {
  const { source, snapshots } = pair();
  await Promise.all([1, 2, 3].map(() => expectRun(0, ["--wait", "30", source])));
  expect(snapshotNames(snapshots).length).toBe(3);
});

test("a good quiet run says nothing; --json prints events, and only those, on stdout", async () => {
  const { source, destination } = pair();
  expect(await expectRun(0, ["-q", source, destination])).toMatchObject({ stdout: "", stderr: "" });
  await nextSecond();
  const result = await expectRun(0, ["-q", "--json", "-N", "1", "-n", "1", source, destination]);
  expect(result.stderr).toBe("");
  const [old, young] = [expect.any(String), snapshotNames(destination)[0]];
  expect(events(result)).toEqual([
    { event: "snapshot", name: young, path: join(source, "snapshot", young ?? "") },
    {
      event: "transfer",
      destination,
      name: young,
      parent: old,
      bytes: expect.any(Number),
      seconds: expect.any(Number),
    },
    { event: "delete", location: destination, name: old, reason: 'not kept by "1"' },
    { event: "delete", location: source, name: old, reason: 'not kept by "1"' },
    {
      event: "summary",
      ok: true,
      snapshot: young,
      transfers: 1,
      deletions: 2,
      free: { [source]: expect.any(Number), [destination]: expect.any(Number) },
    },
  ]);
});

test("-S takes no snapshot, -T sends nothing, -I sends in full", async () => {
  const { source, snapshots, destination } = pair();
  await expectRun(0, ["-T", source, destination]);
  expect([snapshotNames(snapshots).length, snapshotNames(destination).length]).toEqual([1, 0]);
  await expectRun(0, ["-qS", source, destination]);
  expect([snapshotNames(snapshots).length, snapshotNames(destination).length]).toEqual([1, 1]);
  await nextSecond();
  const result = await expectRun(0, ["-I", "--json", source, destination]);
  expect(events(result).find(({ event }) => event === "transfer")).toMatchObject({ parent: null });
  expect(result.stderr).toContain("in full, as asked");
  expect([...subvolumes(destination).values()].map(({ parentUuid }) => parentUuid)).toEqual([
    null,
    null,
  ]);
});

test("missing snapshots are sent oldest first, each against the closest earlier one; a new destination says how many", async () => {
  const { source, snapshots, destination } = pair();
  for (const day of [1, 2, 3]) snapshotAs(source, `2026010${day}-000000`);
  const result = await expectRun(0, ["-S", "--json", source, destination]);
  expect(
    events(result)
      .filter(({ event }) => event === "transfer")
      .map(({ name, parent }) => [name, parent]),
  ).toEqual([
    ["20260101-000000", null],
    ["20260102-000000", "20260101-000000"],
    ["20260103-000000", "20260102-000000"],
  ]);
  expect(result.stderr).toContain("3 snapshots will be sent; --newest-only sends only the newest");
  expectSound(destination, snapshots);
  const other = join(filesystem().path, "other");
  await expectRun(0, ["-S", "--newest-only", source, other]);
  expect(snapshotNames(other)).toEqual(["20260103-000000"]);
});

test("what a destination's policy would drop at once is not sent to it", async () => {
  const { source, destination } = pair();
  for (const day of [1, 2, 3, 4]) snapshotAs(source, `2026010${day}-000000`);
  await expectRun(0, ["-S", "-n", "2", source, destination]);
  expect(snapshotNames(destination)).toEqual(["20260103-000000", "20260104-000000"]);
});

test("each of several destinations gets its own; one that is refused does not stop the others, and keeps its parent", async () => {
  const { source, snapshots, destination } = pair();
  const other = filesystem();
  await expectRun(0, [source, destination, join(other.path, "x")]);
  const [shared] = snapshotNames(snapshots) as [string];
  sh(`umount "$1"`, other.path);
  for (let i = 0; i < 2; i++) {
    await nextSecond();
    const result = await run(["-N", "1", "-n", "1", source, destination, join(other.path, "x")]);
    expect(result.status).toBe(1);
    expect(result.stderr).toContain("is the disk mounted?");
  }
  expect(snapshotNames(destination).length).toBe(1);
  expect(snapshotNames(snapshots)).toEqual([shared, snapshotNames(destination)[0] as string]);
  sh(`mount -o loop "$1" "$2"`, other.image, other.path);
  await nextSecond();
  const back = await expectRun(0, ["-N", "1", "-n", "1", "--json", source, join(other.path, "x")]);
  expect(events(back).find(({ event }) => event === "transfer")).toMatchObject({ parent: shared });
  expectSound(join(other.path, "x"), snapshots);
});

test("retention keeps the first of a calendar period, and explains itself in a dry run that changes nothing", async () => {
  const { source, snapshots, destination } = pair();
  for (const name of [
    "20260101-100000",
    "20260101-200000",
    "20260102-100000",
    "20260102-200000",
    "20260103-100000",
  ])
    snapshotAs(source, name);
  await expectRun(0, ["-S", source, destination]);
  const before = [treeOf(source), treeOf(destination)];
  const dry = await expectRun(0, [
    "-S",
    "-N",
    "2d",
    "-n",
    "1 2d",
    "--dry-run",
    source,
    destination,
  ]);
  expect(dry.stderr).toContain("20260102-100000 stays: first of its day (2d)");
  expect(dry.stderr).toContain("20260102-200000 goes");
  expect([treeOf(source), treeOf(destination)]).toEqual(before);
  await expectRun(0, ["-S", "-N", "2d", "-n", "1 2d", source, destination]);
  expect(snapshotNames(snapshots)).toEqual(["20260102-100000", "20260103-100000"]);
  expect(snapshotNames(destination)).toEqual(["20260102-100000", "20260103-100000"]);
});

/** Everything in a folder of snapshots, itself included. */
const treeOf = (path: string) =>
  sh(
    `cd "$1"; find . -maxdepth 3 -printf '%p %i %T@ %C@ %s\\n' | sort; sha256sum .btrfs-backup.json snapshot/.btrfs-backup.json 2>/dev/null || :`,
    path,
  );

test("a dry run of a first backup makes no folder, no file and no snapshot", async () => {
  const { source, destination } = pair();
  const result = await expectRun(0, ["--dry-run", source, destination]);
  expect(result.stderr).toMatch(/Would take snapshot .*\n.*Would send .*in full/);
  expect([existsSync(join(source, "snapshot")), existsSync(destination)]).toEqual([false, false]);
});

test("many deletions are one btrfs command, and no snapshot costs a process of its own", async () => {
  const { source, snapshots } = pair();
  sh(
    `mkdir "$1/snapshot"; for d in $(seq 100 399); do echo "$1/snapshot/20260101-000$d"; done | while read -r p; do btrfs -q subvolume snapshot -r "$1" "$p" >/dev/null; done`,
    source,
  );
  for (let i = 100; i < 400; i++)
    if (i % 100 >= 60)
      sh(`btrfs subvolume delete "$1" >/dev/null`, join(snapshots, `20260101-000${i}`));
  const { env, calls } = countingBtrfs();
  expect(snapshotNames(snapshots).length).toBe(180);
  await expectRun(0, ["-S", "-N", "3", source], { env });
  expect(snapshotNames(snapshots)).toEqual([
    "20260101-000357",
    "20260101-000358",
    "20260101-000359",
  ]);
  expect(calls().filter((call) => call === "subvolume delete").length).toBe(1);
  expect(calls().length).toBeLessThan(16);
});

test("nested subvolumes are named in one warning; those of the snapshot folder are not", async () => {
  const { source } = pair();
  for (const name of ["one", "two", "three", "four", "plain/five"]) subvolume(join(source, name));
  await expectRun(0, [source]);
  await nextSecond();
  const { stderr } = await expectRun(0, [source]);
  expect(stderr.match(/not part of its snapshots/g)?.length).toBe(1);
  expect(stderr).toContain(
    `5 subvolumes below ${source} are not part of its snapshots: one, two, three, …`,
  );
});

test("commands run around the snapshot: the first can prevent it, the second always runs", async () => {
  const { source, snapshots, destination } = pair();
  const note = join(temporaryDirectory(), "note");
  const dry = await expectRun(0, ["--dry-run", "--before-snapshot", `touch ${note}`, source]);
  expect(dry.stderr).toContain(`Would run --before-snapshot: touch ${note}\n`);
  expect(existsSync(note)).toBe(false);
  await expectRun(0, [
    "--before-snapshot",
    `echo before $(ls ${snapshots} | wc -l) >>${note}; echo quiet >${source}/state`,
    "--after-snapshot",
    `echo after $(ls ${snapshots} | wc -l) >>${note}`,
    source,
    destination,
  ]);
  expect(readFileSync(note, "utf8")).toBe("before 0\nafter 1\n");
  const [name] = snapshotNames(destination) as [string];
  expect(readFileSync(join(destination, name, "state"), "utf8")).toBe("quiet\n");
  const failed = await expectRun(1, [
    "--before-snapshot",
    "echo no database >&2; exit 7",
    "--after-snapshot",
    `echo again >>${note}`,
    source,
    destination,
  ]);
  expect(failed.stderr).toContain("--before-snapshot failed: no database");
  expect(snapshotNames(snapshots)).toEqual([name]);
  expect(readFileSync(note, "utf8")).toEndWith("again\n");
  // What was there before is still sent.
  const late = join(filesystem().path, "late");
  await expectRun(1, ["--before-snapshot", "false", source, late]);
  expect(snapshotNames(late)).toEqual([name]);
});

test("a snapshot that cannot be taken does not stop sending and pruning of what exists", async () => {
  const { source, snapshots, destination } = pair();
  for (const day of [1, 2, 3]) snapshotAs(source, `2026010${day}-000000`);
  // btrfs keeps space back for snapshots, so that a disk which is too full for one is hard to make: btrfs is told to say so.
  const { env } = failingBtrfs(
    "subvolume snapshot",
    "ERROR: cannot snapshot: No space left on device",
  );
  const result = await expectRun(1, ["-N", "1", source, destination], { env });
  expect(result.stderr).toContain("No space left on device");
  expect(snapshotNames(destination)).toEqual([
    "20260101-000000",
    "20260102-000000",
    "20260103-000000",
  ]);
  expect(snapshotNames(snapshots)).toEqual(["20260103-000000"]);
});

/** A `btrfs` first on the PATH that fails at one thing. */
function failingBtrfs(at: string, message: string, last = "*"): { env: Record<string, string> } {
  const directory = temporaryDirectory();
  writeFileSync(
    join(directory, "btrfs"),
    `#!/bin/sh\nfor x; do :; done\ncase "$1 $2 $x" in "${at} "${last}) echo "${message}" >&2; exit 1;; esac\nexec ${sh("command -v btrfs")} "$@"\n`,
    { mode: 0o755 },
  );
  return { env: { PATH: `${directory}:${process.env["PATH"]}` } };
}

test("foreign content on both sides survives a hundred runs, and two prefixes share a destination", async () => {
  const { source, snapshots, destination } = pair();
  sh(`mkdir -p "$1" "$2"`, snapshots, destination);
  for (const folder of [snapshots, destination])
    sh(
      `cd "$1"; echo text >20200101-000000; mkdir 20200102-000000 home-20200103-000000; echo in >20200102-000000/file; ln -s / 20200104-000000
      btrfs -q subvolume create 20201332-000000 >/dev/null; btrfs -q subvolume create other-20200101-000000 >/dev/null; echo kept >other-20200101-000000/file
      btrfs -q subvolume create homes20200101-000000 >/dev/null; btrfs -q subvolume snapshot -r other-20200101-000000 keep-for-ever >/dev/null; btrfs -q subvolume create 20200101-0000001 >/dev/null`,
      folder,
    );
  const foreign = (folder: string) =>
    sh(
      `cd "$1"; find . -maxdepth 2 -not -regex '\\./\\(ho\\|home-\\)2026.*' -not -name '.btrfs-backup*' -not -name . -printf '%p %y %i %T@ %l\\n' | sort`,
      folder,
    );
  const before = [foreign(snapshots), foreign(destination)];
  for (let i = 0; i < 100; i++) {
    const prefix = i % 2 === 0 ? "ho" : "home-";
    snapshotAs(
      source,
      `${prefix}20260101-00${String(Math.floor(i / 60)).padStart(2, "0")}${String(i % 60).padStart(2, "0")}`,
    );
    await expectRun(0, ["-q", "-S", "-N", "1", "-n", "1", "-p", prefix, source, destination]);
  }
  expect([foreign(snapshots), foreign(destination)]).toEqual(before);
  for (const folder of [snapshots, destination]) {
    expect(snapshotNames(folder, "ho")).toEqual(["ho20260101-000138"]);
    expect(snapshotNames(folder, "home-")).toEqual(["home-20260101-000139"]);
  }
});

test("a backup or snapshot that was renamed inside its folder is protected for ever, and not sent again", async () => {
  const { source, snapshots, destination } = pair();
  for (const day of [1, 2, 3]) snapshotAs(source, `2026010${day}-000000`);
  await expectRun(0, ["-S", source, destination]);
  sh(
    `mv "$1/20260102-000000" "$1/before the upgrade"; mv "$2/20260101-000000" "$2/first"`,
    destination,
    snapshots,
  );
  await expectRun(0, ["-S", "-N", "1", "-n", "1", source, destination]);
  expect([...subvolumes(destination).keys()]).toEqual(["20260103-000000", "before the upgrade"]);
  expect([...subvolumes(snapshots).keys()]).toEqual(["20260103-000000", "first"]);
});

test("--convert-rw and --sync delete as well", async () => {
  const { source, snapshots, destination } = pair();
  for (const day of [1, 2, 3]) snapshotAs(source, `2026010${day}-000000`);
  await expectRun(0, ["-S", source, destination]);
  await expectRun(0, ["-S", "-ws", "-N", "1", "-n", "1", source, destination]);
  expect([snapshotNames(snapshots), snapshotNames(destination)]).toEqual([
    ["20260103-000000"],
    ["20260103-000000"],
  ]);
});

test("a record that cannot be read stops all deletion there, not the transfers; unpin --all moves it aside", async () => {
  const { source, snapshots, destination } = pair();
  for (const day of [1, 2, 3]) snapshotAs(source, `2026010${day}-000000`);
  await expectRun(0, ["-S", source, destination]);
  const record = join(snapshots, ".btrfs-backup.json");
  writeFileSync(record, "{ nonsense");
  snapshotAs(source, "20260104-000000");
  const result = await expectRun(1, ["-S", "-N", "1", source, destination]);
  expect(result.stderr).toContain(`unpin --all ${source}`);
  expect(snapshotNames(snapshots).length).toBe(4);
  expect(snapshotNames(destination).length).toBe(4);
  await expectRun(0, ["unpin", "--all", source]);
  expect(
    readdirSync(snapshots).filter((name) => name.startsWith(".btrfs-backup.json.")),
  ).toHaveLength(1);
  await expectRun(0, ["-S", "-N", "1", source, destination]);
  expect(snapshotNames(snapshots)).toEqual(["20260104-000000"]);
  writeFileSync(join(destination, ".btrfs-backup.json"), "[]");
  await expectRun(1, ["-S", "-n", "1", source, destination]);
  expect(snapshotNames(destination).length).toBe(4);
});

test("a record full of zeros, as a loss of power leaves one, is not taken for none", async () => {
  const { source, snapshots, destination } = pair();
  const away = filesystem();
  for (const day of [1, 2]) snapshotAs(source, `2026010${day}-000000`);
  await expectRun(0, ["-S", source, destination, join(away.path, "away")]);
  snapshotAs(source, "20260103-000000");
  unmount(away);
  for (const [text, folder] of [
    ["\0".repeat(300), snapshots],
    ['{"/": 1\0\n}\n', snapshots],
    ["\0".repeat(300), destination],
  ] as const) {
    const record = join(folder, ".btrfs-backup.json");
    const before = readFileSync(record);
    writeFileSync(record, text);
    const { stderr } = await expectRun(1, [
      "-S",
      folder === snapshots ? "-N" : "-n",
      "1",
      source,
      destination,
    ]);
    expect(stderr).toContain(".btrfs-backup.json cannot be read");
    expect(readFileSync(record, "utf8")).toBe(text);
    writeFileSync(record, before);
    expect(snapshotNames(folder).length).toBe(3);
  }
});

test("unpin, --remove-locks and --locked-dests", async () => {
  const { source, snapshots, destination } = pair();
  const other = join(filesystem().path, "other");
  for (const day of [1, 2]) snapshotAs(source, `2026010${day}-000000`);
  await expectRun(0, ["-S", source, destination, other]);
  snapshotAs(source, "20260103-000000");
  await expectRun(0, ["-S", "--locked-dests", source]); // both, without naming them
  expect([snapshotNames(destination).length, snapshotNames(other).length]).toEqual([3, 3]);
  snapshotAs(source, "20260104-000000");
  await expectRun(0, ["-S", "-N", "1", source, destination]);
  expect(snapshotNames(snapshots)).toEqual(["20260103-000000", "20260104-000000"]); // one is other's
  expect((await expectRun(1, ["unpin", source, "/elsewhere"])).stderr).toContain("not known");
  expect(events(await expectRun(0, ["unpin", "--json", source, other]))).toEqual([
    { event: "unpin", destination: other },
    { event: "summary", ok: true },
  ]);
  await expectRun(0, ["-S", "-N", "1", source, destination]);
  expect(snapshotNames(snapshots)).toEqual(["20260104-000000"]);
  snapshotAs(source, "20260105-000000");
  await expectRun(0, ["-S", "-T", "--remove-locks", "--locked-dests", "-N", "1", source]);
  expect(snapshotNames(snapshots)).toEqual(["20260105-000000"]);
});

test("a run that ends between two destinations leaves the source with the first one's new pin", async () => {
  const { source, snapshots, destination } = pair();
  snapshotAs(source, "20260101-000000");
  const gate = join(temporaryDirectory(), "gate");
  const command = `shell://cat >/dev/null; echo reached >>${gate}; while [ -e ${gate} ]; do sleep 0.05; done`;
  await expectRun(0, ["-S", source, destination]);
  snapshotAs(source, "20260102-000000");
  const running = start(["-S", "-n", "1", source, destination, command]);
  await waitFor(
    "both destinations",
    () =>
      existsSync(gate) &&
      readdirSync(destination)
        .filter((name) => name.startsWith("2"))
        .join() === "20260102-000000",
  );
  running.child.kill("SIGKILL");
  rmSync(gate);
  await running.finished;
  snapshotAs(source, "20260103-000000");
  // The killed run's command may not have seen yet that the gate is gone: until then it holds its lock.
  await expectRun(0, ["-S", "--wait", "100", "-N", "1", source]);
  expect(snapshotNames(snapshots)).toEqual(["20260102-000000", "20260103-000000"]);
});

test("a snapshot that cannot be sent is left out: the later ones go, against what was sent before", async () => {
  const { source, snapshots, destination } = pair();
  snapshotAs(source, "20260101-000000");
  await expectRun(0, ["-S", source, destination]);
  for (const day of [2, 3, 4]) snapshotAs(source, `2026010${day}-000000`);
  const { env } = failingBtrfs("send -q", "ERROR: no luck", "*20260103-000000");
  const failed = await expectRun(
    1,
    ["-S", "--json", "-N", "1", "--drop-unsent", source, destination],
    { env },
  );
  expect(failed.stderr).toMatch(/no luck[^]*without 20260103-000000/);
  expect(
    events(failed)
      .filter(({ event }) => event === "transfer")
      .map(({ name, parent }) => [name, parent]),
  ).toEqual([
    ["20260102-000000", "20260101-000000"],
    ["20260104-000000", "20260102-000000"],
  ]);
  expect(snapshotNames(destination)).toEqual([
    "20260101-000000",
    "20260102-000000",
    "20260104-000000",
  ]);
  expectSound(destination, snapshots);
  expect(snapshotNames(snapshots)).toEqual(["20260104-000000"]);
});

test("a new snapshot's name is free at the destinations, too", async () => {
  const { source, snapshots, destination } = pair();
  await expectRun(0, [source, destination]);
  // As when clocks go back: the destination has the names of the seconds to come, the source has not.
  const now = Date.now();
  const names = [1, 2, 3].map((s) =>
    sh(`date -d @$(($1 / 1000 + $2)) +%Y%m%d-%H%M%S`, String(now), String(s)),
  );
  for (const name of names) sh(`mkdir "$1/$2"`, destination, name);
  await nextSecond();
  await expectRun(0, [source, destination]);
  expect(snapshotNames(snapshots).length).toBe(2);
  expect(names).not.toContain(snapshotNames(snapshots)[1] as string);
});

test("a leftover whose snapshot is gone does not stay for ever", async () => {
  const { source, destination } = pair();
  snapshotAs(source, "20260101-000000");
  await expectRun(0, ["-S", source, destination]);
  const file = join(destination, ".btrfs-backup.json");
  sh(`btrfs -q subvolume create "$1/20260102-000000" >/dev/null`, destination);
  writeFileSync(
    file,
    readFileSync(file, "utf8").replace(`{"owner"`, `{"receiving":"20260102-000000","owner"`),
  );
  snapshotAs(source, "20260103-000000");
  await expectRun(0, ["-S", source, destination]);
  expect([...subvolumes(destination).keys()]).toEqual(["20260101-000000", "20260103-000000"]);
});

test("progress is drawn on a terminal, and only there", async () => {
  const { source, destination } = pair();
  sh(`head -c 30M /dev/urandom >"$1/large"`, source);
  const log = join(temporaryDirectory(), "typescript");
  const command = (...args: string[]) =>
    sh(
      `log=$1; shift; script -qec "$*" "$log" >/dev/null || { cat "$log" >&2; exit 9; }; cat "$log"`,
      log,
      ...args,
    );
  const program = `env -u NO_COLOR ${join(import.meta.dir, "../node_modules/.bin/bun")} ${join(import.meta.dir, "../btrfs-backup.ts")}`;
  expect(command(program, source, destination)).toMatch(
    / 30\.\dM +\d+\.\dM\/s 0:00:0\d\r\n\x1b\[1A\x1b\[J\x1b\[36m\[info\]\x1b\[0m Done/,
  );
  await nextSecond();
  expect(command(program, "-P", source, destination)).not.toMatch(/[BM]\/s 0:/);
  await nextSecond();
  expect((await expectRun(0, [source, destination])).stderr).not.toMatch(/[BM]\/s 0:/);
  expect(command(program, "restore", destination, join(filesystem().path, "back"))).toMatch(
    /M\/s 0:/,
  );
  expect(
    command(program, "restore", "-P", destination, join(filesystem().path, "back")),
  ).not.toMatch(/[BM]\/s 0:/);
  // So are colours, unless they are not wanted.
  expect(command(program, "-S", "-P", source, "/nowhere/x", "|| :")).toContain(
    "\x1b[31m[error]\x1b[0m /nowhere/x",
  );
  expect(
    command(program.replace("-u NO_COLOR", "NO_COLOR=1"), "-S", "-P", source, "/nowhere/x", "|| :"),
  ).not.toContain("\x1b");
  expect((await run(["-S", source, "/nowhere/x"])).stderr).not.toContain("\x1b");
  // Where quotas tell the size of a full stream, the bar has an end.
  sh(`btrfs quota enable "$1"; btrfs quota rescan -w "$1" >/dev/null`, source);
  await nextSecond();
  expect(command(program, source, join(filesystem().path, "x"), "--newest-only")).toMatch(
    /==> +\d+% \d:\d\d:\d\d left/,
  );
});

test("a source on which no record can be written is pruned all the same, by the old pins and the new", async () => {
  const { source, snapshots, destination } = pair();
  for (const day of [1, 2]) snapshotAs(source, `2026010${day}-000000`);
  await expectRun(0, ["-S", source, destination]);
  for (const day of [3, 4, 5]) snapshotAs(source, `2026010${day}-000000`);
  // The new record's name is taken by something that cannot be removed.
  sh(`mkdir "$1/.btrfs-backup.json.new"`, snapshots);
  const result = await expectRun(1, ["-S", "-N", "1", source, destination]);
  expect(result.stderr).toContain("cannot write .btrfs-backup.json");
  expect(snapshotNames(snapshots)).toEqual(["20260102-000000", "20260105-000000"]);
  sh(`rmdir "$1/.btrfs-backup.json.new"`, snapshots);
  await expectRun(0, ["-S", "-N", "1", source, destination]);
  expect(snapshotNames(snapshots)).toEqual(["20260105-000000"]);
});

test("--metrics writes what monitoring wants to know, whole or not at all, and a failure does not forget the last success", async () => {
  const { source, destination, b } = pair();
  const directory = temporaryDirectory();
  const file = join(directory, "home.prom");
  const odd = `/nowhere/q"uote\\`;
  const args = [
    "-q",
    "--metrics",
    file,
    "-N",
    "2",
    "-n",
    "1",
    source,
    destination,
    odd,
    "shell://cat >/dev/null",
  ];
  const values = () =>
    new Map(
      readFileSync(file, "utf8")
        .split("\n")
        .filter((line) => line !== "" && !line.startsWith("#"))
        .map((line) => [
          line.slice(0, line.lastIndexOf(" ")).replace("btrfs_backup_", ""),
          Number(line.slice(line.lastIndexOf(" ") + 1)),
        ]),
    );
  const of = (name: string, place: string | null) =>
    values().get(
      `${name}{source="${source}"${place === null ? "" : `,destination="${place.replace(/["\\]/g, "\\$&")}"`}}`,
    );
  for (let i = 0; i < 3; i++) {
    await expectRun(1, args);
    await nextSecond();
  }
  for (const line of readFileSync(file, "utf8").trimEnd().split("\n"))
    expect(line).toMatch(
      /^(# (HELP|TYPE) btrfs_backup_\w+ .+|btrfs_backup_\w+\{source="[^"]*"(,destination="([^"\\\n]|\\.)*")?\} [\d.]+)$/,
    );
  expect([
    of("errors", destination),
    of("errors", odd),
    of("errors", "shell://cat >/dev/null"),
    of("errors", null),
  ]).toEqual([0, 1, 0, 0]);
  expect([of("snapshots", null), of("snapshots", destination), of("snapshots", odd)]).toEqual([
    3,
    1,
    undefined,
  ]); // nothing goes while a destination is not known yet
  expect(of("sent_bytes", destination)).toBeGreaterThan(100);
  expect(of("duration_seconds", destination)).toBeGreaterThan(0);
  const last = of("last_success_timestamp_seconds", destination) as number;
  expect(Math.abs(last - Date.now() / 1000)).toBeLessThan(60);
  expect(of("last_success_timestamp_seconds", odd)).toBe(0); // so that an alert fires
  expect(sh(`stat -c %a "$1"; ls -A "$(dirname "$1")"`, file)).toBe("644\nhome.prom");
  unmount(b);
  await expectRun(1, args);
  expect([
    of("errors", destination),
    of("last_success_timestamp_seconds", destination),
    of("sent_bytes", destination),
  ]).toEqual([1, last, 0]);
  expect((await expectRun(1, ["-q", "--metrics", "/nowhere/x.prom", source])).stderr).toContain(
    "--metrics: cannot write /nowhere/x.prom",
  );
});

test("the summary says what was sent where, how much, what was deleted, and what is kept", async () => {
  const { source, destination } = pair();
  const other = join(filesystem().path, "other");
  const args = ["-N", "2", "-n", "1", source, destination, other];
  await expectRun(0, args);
  await nextSecond();
  const { stderr } = await expectRun(1, [...args, "/nowhere/x"]);
  const lines = stderr.split("\n");
  const at = lines.findIndex((line) =>
    line.includes("Done: 1 snapshot, 2 transfers, 2 deletions, with errors"),
  );
  const rows = new Map(
    lines.slice(at + 2).map((line) => [line.split(" ")[0], line.trim().split(/ {2,}/).slice(1)]),
  );
  expect(lines[at + 1]?.trim().split(/ +/)).toEqual([
    "sent",
    "bytes",
    "time",
    "deleted",
    "kept",
    "free",
  ]);
  const [figures, seconds, free] = [
    expect.stringMatching(/^[\d.]+[BK]$/),
    expect.stringMatching(/^\d+\.\d s$/),
    expect.stringMatching(/^[\d.]+[MG]$/),
  ];
  // In the order of the command line, the source first.
  expect([...rows.keys()].slice(0, 4)).toEqual([source, destination, other, "/nowhere/x"]);
  expect(rows.get(source)).toEqual([seconds, "0", "2", free]);
  for (const place of [destination, other])
    expect(rows.get(place)).toEqual(["1", figures, seconds, "1", "1", free]);
  const why = expect.stringMatching(/^failed: no such directory: \/nowhere/);
  expect(rows.get("/nowhere/x")).toEqual(["0", "0B", seconds, "0", why]);
  expect((await expectRun(0, ["-q", source, destination])).stderr).toBe("");
});

test("the script for cron.daily runs every argument file, and its status tells of a failure", async () => {
  const { source, destination } = pair();
  const directory = temporaryDirectory();
  const script = readFileSync(join(ROOT, "scripts/cron.daily"), "utf8")
    .replaceAll("/etc/btrfs-backup", directory)
    .replace("/usr/local/sbin/btrfs-backup", join(ROOT, "dist/btrfs-backup"));
  writeFileSync(join(directory, "a.args"), `--num-backups 3\n${source}\n${destination}\n`);
  writeFileSync(join(directory, "empty.args"), "");
  const cron = () => spawnSync("sh", ["-c", script], { encoding: "utf8" });
  expect(cron()).toMatchObject({ status: 0, stdout: "", stderr: "" });
  expect(snapshotNames(destination).length).toBe(1);
  writeFileSync(join(directory, "0.args"), `${source}\n/nowhere/at/all\n`);
  await nextSecond();
  expect(cron()).toMatchObject({ status: 1, stderr: expect.stringContaining("/nowhere") });
  expect(snapshotNames(destination).length).toBe(2); // a's own
});
