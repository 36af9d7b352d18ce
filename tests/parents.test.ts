// A difference is only as good as what it is the difference to: a parent that somebody edited, that has nothing to do
// with the snapshot, or that is damaged at the destination makes no wrong backup, and none that never comes.

import { describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  contentsDigest,
  damage,
  events,
  expectRun,
  expectSameTree,
  expectSound,
  filesystem,
  nextSecond,
  type Options,
  pair,
  pathWith,
  reformat,
  type Result,
  s3Remote,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  subvolume,
  subvolumes,
  temporaryDirectory,
  transfers,
  treeDigest,
} from "./support/rig.ts";
import { day } from "./support/names.ts";

const EDITED = /edited/i;
const UNRELATED = /not made from|related|connect/i;

/** What was sent against what. */
const sent = (result: Result) => transfers(result).map(({ name, parent }) => [name, parent]);
/** Runs without a new snapshot, and says what was sent. */
const send = (source: string, place: string, options?: Options, args: readonly string[] = []) =>
  expectRun(0, ["-S", "--json", ...args, source, place], options);

/** The next day's snapshot, with something new in it. */
function next(source: string, n: number, script = ":"): void {
  sh(`cd "$1"; echo "$2" >today; ${script}`, source, day(n));
  snapshotAs(source, day(n));
}

/** A source with snapshots of some days, and the destination that has them. */
async function backedUp(...days: number[]) {
  const it = pair();
  for (const n of days) next(it.source, n);
  await send(it.source, it.destination);
  return {
    ...it,
    snapshot: (n: number) => join(it.snapshots, day(n)),
    backup: (n: number) => join(it.destination, day(n)),
  };
}

/** What was sent in full on the second day is what the third one builds on, and nothing is said of why not. */
async function expectGoesOn(
  {
    source,
    destination,
    snapshot,
    backup,
  }: Pick<Awaited<ReturnType<typeof backedUp>>, "source" | "destination" | "snapshot" | "backup">,
  why: RegExp,
): Promise<void> {
  next(source, 3);
  const after = await send(source, destination);
  expect(sent(after)).toEqual([[day(3), day(2)]]);
  expect(after.stderr).not.toMatch(why);
  expectSameTree(snapshot(3), backup(3));
}

/** What anybody can do with a snapshot: make it writable, change it by a script that runs in it, make it read-only again. */
const edit = (snapshot: string, script: string, ...args: string[]) =>
  sh(
    `cd "$1"; shift; btrfs property set -ts . ro false; ${script}; btrfs property set -ts . ro true`,
    snapshot,
    ...args,
  );

/** A change that leaves all as it was. */
const HARMLESS = "chmod u+x plain/9; chmod u-x plain/9";

/** Edits that a later difference to the edited one is wrong with, in the source and in its snapshot, whose path is $1. */
const EDITS: [string, string, string][] = [
  ["a file was removed from it", "rm plain/9", "rm plain/9"],
  // A difference leaves out what both have in the same place of the disk.
  [
    "a text in it was replaced",
    "printf replaced | dd of=plain/deep/er/large conv=notrunc 2>/dev/null; sync -f .",
    `cp --reflink=always --preserve=timestamps "$1/plain/deep/er/large" plain/deep/er/large`,
  ],
  ["a file was put into it", ":", "echo x >plain/put"],
];

/** A program in a directory that does something before it is the one of this machine. */
const first = (directory: string, tool: string, script: string) =>
  writeFileSync(
    join(directory, tool),
    `#!/bin/sh\n${script}\nexec ${sh(`command -v ${tool}`)} "$@"\n`,
    { mode: 0o755 },
  );

/** A `tar` and a `btrfs` first on the PATH that note what they are called with. */
function watched(): {
  env: Record<string, string>;
  comparisons: () => number;
  receives: () => number;
} {
  const directory = temporaryDirectory();
  const notes = join(directory, "notes");
  writeFileSync(notes, "");
  for (const tool of ["tar", "btrfs"]) first(directory, tool, `echo "${tool} $1" >>${notes}`);
  const counted = (line: string) =>
    readFileSync(notes, "utf8")
      .split("\n")
      .filter((note) => note === line).length;
  return {
    env: pathWith(directory),
    comparisons: () => counted("tar --create"),
    receives: () => counted("btrfs receive"),
  };
}

/** Has the kernel store the same data of two files once, as tools for deduplication do; it works on read-only snapshots. */
function deduplicate(subvolume: string, from: string, to: string): void {
  // FIDEDUPERANGE of linux/fs.h: offset, length, one destination: its descriptor, offset, bytes done, status.
  const script = `open(my $f, "<", $ARGV[0]) or die; open(my $t, "<", $ARGV[1]) or die;
    my $range = pack("QQSSLqQQlL", 0, -s $f, 1, 0, 0, fileno($t), 0, 0, 0, 0);
    ioctl($f, 0xC0189436, $range) or die "$!";
    my @done = unpack("QQSSLqQQlL", $range); die "@done" if $done[8] != 0 || $done[7] != -s $f`;
  sh(`cd "$1"; perl -e "$2" "$3" "$4"; sync -f .`, subvolume, script, from, to);
}

describe("a snapshot that was edited", () => {
  test.each(EDITS)("is no parent where another is shared (%s)", async (_, change, edits) => {
    const { source, destination, snapshot, backup } = await backedUp(1, 2);
    const watch = watched();
    sh(`cd "$1"; ${change}`, source);
    edit(snapshot(2), edits, source);
    next(source, 3);
    const result = await send(source, destination, watch);
    expectSameTree(snapshot(3), backup(3));
    expect(sent(result)).toEqual([[day(3), day(1)]]);
    expect(watch.comparisons()).toBe(0);
    next(source, 4);
    expect(sent(await send(source, destination, watch))).toEqual([[day(4), day(3)]]);
    expect(watch.comparisons()).toBe(0);
  });

  test.each(EDITS)(
    "and is the only one that is shared: what follows is sent in full, and says why (%s)",
    async (_, change, edits) => {
      const { source, destination, snapshot, backup } = await backedUp(1);
      sh(`cd "$1"; ${change}`, source);
      edit(snapshot(1), edits, source);
      next(source, 2);
      const result = await send(source, destination);
      expectSameTree(snapshot(2), backup(2));
      expect(sent(result)).toEqual([[day(2), null]]);
      expect(result.stderr).toMatch(EDITED);
      expect(result.stderr).toContain(day(1));
      await expectGoesOn({ source, destination, snapshot, backup }, EDITED);
    },
  );

  test("as all that are shared were: nothing is built on the one that differs", async () => {
    const { source, destination, snapshot, backup } = await backedUp(1, 2);
    sh(`rm "$1/plain/9"`, source);
    for (const n of [1, 2]) edit(snapshot(n), "rm plain/9");
    next(source, 3);
    const result = await send(source, destination);
    expectSameTree(snapshot(3), backup(3));
    expect(sent(result)).toEqual([[day(3), null]]);
    expect(result.stderr).toMatch(EDITED);
  });

  test("is no parent of the first of several that are sent in one run; these are parents of each other", async () => {
    const { source, destination, snapshot, backup } = await backedUp(1);
    for (const n of [2, 3]) next(source, n);
    sh(`rm "$1/plain/9"`, source);
    edit(snapshot(1), "rm plain/9");
    next(source, 4);
    expect(sent(await send(source, destination))).toEqual([
      [day(2), null],
      [day(3), day(2)],
      [day(4), day(3)],
    ]);
    for (const n of [2, 3, 4]) expectSameTree(snapshot(n), backup(n));
  });

  test("is seen on a destination that is reached over ssh, also by a key that may not read there", async () => {
    const { guarded, options, url } = await sshServer();
    for (const key of [() => options, (path: string) => guarded("--path", path)]) {
      const { source, snapshot, backup, destination, b } = await backedUp(1);
      const words = key(b.path);
      sh(`rm "$1/plain/9"`, source);
      edit(snapshot(1), "rm plain/9");
      next(source, 2);
      const result = await send(source, url(destination), {}, [...words, "--adopt"]);
      expectSameTree(snapshot(2), backup(2));
      expect(sent(result)).toEqual([[day(2), null]]);
      expect(result.stderr).toMatch(EDITED);
    }
  });

  test.each(["a folder", "a bucket"])(
    "cannot be compared with a stored stream (in %s): what follows is sent in full",
    async (where) => {
      const { source, snapshots } = pair();
      const s3 = where === "a bucket" ? await s3Remote() : null;
      const store = s3?.url("s") ?? `raw://${temporaryDirectory()}/s`;
      const options = { env: s3?.env ?? {} };
      next(source, 1);
      await send(source, store, options);
      sh(`rm "$1/plain/9"`, source);
      edit(join(snapshots, day(1)), "rm plain/9");
      next(source, 2);
      const result = await send(source, store, options);
      const target = join(filesystem().path, "again");
      await expectRun(0, ["restore", "-q", "--snapshot", day(2), store, target], options);
      expect(contentsDigest(target)).toBe(contentsDigest(join(snapshots, day(2))));
      expect(sent(result)).toEqual([[day(2), null]]);
      expect(result.stderr).toMatch(EDITED);
      // One that was not edited is there again.
      edit(join(snapshots, day(1)), "rm plain/8");
      next(source, 3);
      expect(sent(await send(source, store, options))).toEqual([[day(3), day(2)]]);
      edit(join(snapshots, day(3)), "rm plain/10");
      next(source, 4, "rm plain/10");
      expect(sent(await send(source, store, options))).toEqual([[day(4), day(2)]]);
      const last = join(filesystem().path, "last");
      await expectRun(0, ["restore", "-q", "--snapshot", day(4), store, last], options);
      expect(contentsDigest(last)).toBe(contentsDigest(join(snapshots, day(4))));
    },
  );

  test("cannot be compared with what a command took: it gets the next one in full, and is told so", async () => {
    const { source, snapshots } = pair();
    const out = temporaryDirectory();
    const command = `shell://cat >${out}/$BTRFS_BACKUP_NAME.$BTRFS_BACKUP_KIND`;
    next(source, 1);
    await send(source, command);
    sh(`rm "$1/plain/9"`, source);
    edit(join(snapshots, day(1)), "rm plain/9");
    next(source, 2);
    const result = await send(source, command);
    expect(sh(`ls "$1"`, out).split("\n")).toEqual([`${day(1)}.full`, `${day(2)}.full`]);
    expect(sent(result)).toEqual([[day(2), null]]);
    expect(result.stderr).toMatch(EDITED);
    const other = filesystem();
    sh(`btrfs receive -q "$1" <"$2"`, other.path, join(out, `${day(2)}.full`));
    expectSameTree(join(snapshots, day(2)), join(other.path, day(2)));
    next(source, 3);
    expect(sent(await send(source, command))).toEqual([[day(3), day(2)]]);
  });
});

describe("a snapshot that may have been edited", () => {
  /** Another day is sent after the last one was taken back on both sides: it has the same parents to choose from. */
  async function again(
    it: Awaited<ReturnType<typeof backedUp>>,
    gone: number,
    n: number,
    options: Options,
  ): Promise<Result> {
    sh(`btrfs -q subvolume delete "$1" "$2" >/dev/null`, it.snapshot(gone), it.backup(gone));
    next(it.source, n);
    return send(it.source, it.destination, options);
  }

  test("is not one that was only made writable and read-only again: the difference to it is sent, nothing is compared", async () => {
    const { source, destination, snapshot, backup } = await backedUp(1);
    const watch = watched();
    edit(snapshot(1), ":");
    next(source, 2);
    const result = await send(source, destination, watch);
    expect(sent(result)).toEqual([[day(2), day(1)]]);
    expect(result.stderr).not.toMatch(EDITED);
    expect(watch.comparisons()).toBe(0);
    expectSameTree(snapshot(2), backup(2));
  });

  test("is compared with its backup once, and is a parent as before when it is the same", async () => {
    const it = await backedUp(1, 2);
    const watch = watched();
    for (const n of [1, 2]) edit(it.snapshot(n), HARMLESS);
    next(it.source, 3);
    expect(sent(await send(it.source, it.destination, watch))).toEqual([[day(3), day(2)]]);
    const comparisons = watch.comparisons();
    expect(comparisons).toBeGreaterThan(0);
    expectSameTree(it.snapshot(3), it.backup(3));
    expect(sent(await again(it, 3, 4, watch))).toEqual([[day(4), day(2)]]);
    expect(watch.comparisons()).toBe(comparisons);
    expectSameTree(it.snapshot(4), it.backup(4));
  });

  test("and was found the same is compared again after the next edit", async () => {
    const it = await backedUp(1);
    const watch = watched();
    edit(it.snapshot(1), HARMLESS);
    next(it.source, 2);
    expect(sent(await send(it.source, it.destination, watch))).toEqual([[day(2), day(1)]]);
    const comparisons = watch.comparisons();
    expect(comparisons).toBeGreaterThan(0);
    sh(`rm "$1/plain/9"`, it.source);
    edit(it.snapshot(1), "rm plain/9");
    const result = await again(it, 2, 3, watch);
    expectSameTree(it.snapshot(3), it.backup(3));
    expect(sent(result)).toEqual([[day(3), null]]);
    expect(watch.comparisons()).toBeGreaterThan(comparisons);
    expect(result.stderr).toMatch(EDITED);
  });

  test("in a dry run changes nothing, and what is sent after it is right", async () => {
    const { source, destination, snapshots, snapshot, backup } = await backedUp(1);
    sh(`rm "$1/plain/9"`, source);
    edit(snapshot(1), "rm plain/9");
    next(source, 2);
    const record = readFileSync(join(snapshots, ".btrfs-backup.json"), "utf8");
    await expectRun(0, ["-S", "--dry-run", source, destination]);
    expect(readFileSync(join(snapshots, ".btrfs-backup.json"), "utf8")).toBe(record);
    expect(sent(await send(source, destination))).toEqual([[day(2), null]]);
    expectSameTree(snapshot(2), backup(2));
  });

  /** Two files with the same data, in snapshots that a deduplication went through. */
  async function deduplicated() {
    const it = pair();
    sh(`cd "$1"; head -c 1M /dev/urandom >one; cp --reflink=never one two`, it.source);
    for (const n of [1, 2]) next(it.source, n);
    await send(it.source, it.destination);
    const full = {
      ...it,
      snapshot: (n: number) => join(it.snapshots, day(n)),
      backup: (n: number) => join(it.destination, day(n)),
    };
    for (const n of [1, 2]) deduplicate(full.snapshot(n), "one", "two");
    return full;
  }

  test("because all files were deduplicated costs one comparison, no transfer in full, and nothing at the next run", async () => {
    const it = await deduplicated();
    const watch = watched();
    next(it.source, 3);
    expect(sent(await send(it.source, it.destination, watch))).toEqual([[day(3), day(2)]]);
    const comparisons = watch.comparisons();
    expect(comparisons).toBeGreaterThan(0);
    expectSameTree(it.snapshot(3), it.backup(3));
    expect(sent(await again(it, 3, 4, watch))).toEqual([[day(4), day(2)]]);
    expect(watch.comparisons()).toBe(comparisons);
    expectSound(it.destination, it.snapshots);
  });

  test("and was verified is not compared again", async () => {
    const it = await deduplicated();
    const watch = watched();
    await expectRun(0, ["verify", it.source, it.destination], watch);
    const comparisons = watch.comparisons();
    next(it.source, 3);
    expect(sent(await send(it.source, it.destination, watch))).toEqual([[day(3), day(2)]]);
    expect(watch.comparisons()).toBe(comparisons);
    expectSameTree(it.snapshot(3), it.backup(3));
    // What was verified is not what it is after one more edit.
    sh(`rm "$1/plain/9"`, it.source);
    for (const n of [1, 2]) edit(it.snapshot(n), "rm plain/9");
    expect(sent(await again(it, 3, 4, watch))).toEqual([[day(4), null]]);
    expectSameTree(it.snapshot(4), it.backup(4));
  });
});

describe("a restore brings back what the backup has, though the source's own snapshot of it was edited", () => {
  /** Backups of two days, and the first day's snapshot edited; what each day was. */
  async function edited(folder: "snapshot" | "outside" = "snapshot") {
    const it = pair();
    const snapshots = folder === "snapshot" ? it.snapshots : join(it.a.path, folder);
    if (folder === "outside") mkdirSync(snapshots);
    const run = async () => {
      const told = events(
        await expectRun(0, ["--json", "-f", snapshots, it.source, it.destination]),
      );
      const name = told.find(({ event }) => event === "snapshot")?.["name"] as string;
      return { name, state: contentsDigest(join(snapshots, name)) };
    };
    const first = await run();
    await nextSecond();
    writeFileSync(join(it.source, "today"), "2");
    const second = await run();
    edit(join(snapshots, first.name), "rm plain/9");
    return { ...it, snapshots, first, second };
  }

  test("to a new place on the source's filesystem", async () => {
    const { destination, a, first } = await edited();
    await expectRun(0, ["restore", "--snapshot", first.name, destination, join(a.path, "new")]);
    expect(contentsDigest(join(a.path, "new"))).toBe(first.state);
  });

  test("to a new place, with the source's snapshots to build on", async () => {
    const { destination, a, snapshots, first, second } = await edited();
    await expectRun(0, [
      "restore",
      "--snapshot",
      first.name,
      "--parent-from",
      snapshots,
      destination,
      join(a.path, "new"),
    ]);
    expect(contentsDigest(join(a.path, "new"))).toBe(first.state);
    sh(`btrfs -q subvolume delete "$1" >/dev/null`, join(snapshots, second.name));
    await expectRun(0, [
      "restore",
      "--snapshot",
      second.name,
      "--parent-from",
      snapshots,
      destination,
      join(a.path, "newer"),
    ]);
    expect(contentsDigest(join(a.path, "newer"))).toBe(second.state);
  });

  test("in the place of the source, and the next backup is right as well", async () => {
    const { source, destination, snapshots, first } = await edited();
    await expectRun(0, ["restore", "--replace", "--snapshot", first.name, destination, source]);
    expect(contentsDigest(source)).toBe(first.state);
    await nextSecond();
    await expectRun(0, [source, destination]);
    const newest = snapshotNames(snapshots).at(-1) as string;
    expectSameTree(join(snapshots, newest), join(destination, newest));
    expect(existsSync(join(destination, newest, "plain/9"))).toBe(true);
  });

  test("in the place of the source, where the edited one is all that it shares", async () => {
    const { source, destination, snapshots, second } = await edited();
    sh(`btrfs -q subvolume delete "$1" >/dev/null`, join(snapshots, second.name));
    await expectRun(0, ["restore", "--replace", "--snapshot", second.name, destination, source]);
    expect(contentsDigest(source)).toBe(second.state);
  });

  test("with the snapshot folder outside, where the edited one has the name already", async () => {
    const { source, destination, snapshots, first } = await edited("outside");
    sh(`btrfs -q subvolume delete "$1" >/dev/null`, source);
    await expectRun(0, ["restore", "-f", snapshots, "--snapshot", first.name, destination, source]);
    expect(contentsDigest(source)).toBe(first.state);
  });
});

describe("a received snapshot", () => {
  const receive = (backup: string, folder: string, parent?: string) =>
    sh(
      `mkdir -p "$2"; btrfs send -q \${3:+-p "$3"} "$1" | btrfs receive -q "$2"`,
      backup,
      folder,
      parent ?? "",
    );

  test("is no parent of a source that its files were only copied to: what follows is sent in full, and says why", async () => {
    const { source, destination, snapshots, snapshot, backup, a } = await backedUp(1);
    reformat(a);
    subvolume(source);
    receive(backup(1), snapshots);
    sh(`cp -aR "$1/." "$2"`, snapshot(1), source);
    next(source, 2, "rm plain/10; mv plain/11 plain/12; echo x >>plain/13");
    const result = await send(source, destination);
    expect(sent(result)).toEqual([[day(2), null]]);
    expectSameTree(snapshot(2), backup(2));
    expect(result.stderr).toMatch(UNRELATED);
    await expectGoesOn({ source, destination, snapshot, backup }, UNRELATED);
  });

  test("that the source was made from is its parent", async () => {
    const { source, destination, backup, a } = await backedUp(1);
    reformat(a);
    const folder = join(a.path, "snapshots");
    receive(backup(1), folder);
    sh(
      `btrfs -q subvolume snapshot "$1" "$2" >/dev/null; rm "$2/plain/10"`,
      join(folder, day(1)),
      source,
    );
    const result = await expectRun(0, ["--json", "-f", folder, source, destination]);
    const newest = snapshotNames(folder).at(-1) as string;
    expect(sent(result)).toEqual([[newest, day(1)]]);
    expect(result.stderr).not.toMatch(UNRELATED);
    expectSameTree(join(folder, newest), join(destination, newest));
  });

  test("and the source that were both made from one that is gone are parent and child", async () => {
    const { source, destination, snapshots, snapshot, backup, a } = await backedUp(1, 2);
    reformat(a);
    const first = join(a.path, "tmp", day(1));
    receive(backup(1), join(a.path, "tmp"));
    sh(`btrfs -q subvolume snapshot "$1" "$2" >/dev/null`, first, source);
    receive(backup(2), snapshots, backup(1));
    const gone = subvolumes(join(a.path, "tmp")).get(day(1))?.uuid as string;
    sh(`btrfs -q subvolume delete "$1" >/dev/null`, first);
    expect([
      subvolumes(snapshots).get(day(2))?.parentUuid,
      subvolumes(a.path).get("home")?.parentUuid,
    ]).toEqual([gone, gone]);
    next(source, 3, "rm plain/10");
    const result = await send(source, destination);
    expect(sent(result)).toEqual([[day(3), day(2)]]);
    expect(result.stderr).not.toMatch(UNRELATED);
    expectSameTree(snapshot(3), backup(3));
  });

  test("after a restore is the parent of what follows", async () => {
    const { source, destination, snapshots, a } = await backedUp(1, 2);
    reformat(a);
    await expectRun(0, ["restore", destination, source]);
    await nextSecond();
    sh(`echo 3 >"$1/today"; rm "$1/plain/10"`, source);
    const result = await expectRun(0, ["--json", source, destination]);
    const newest = snapshotNames(snapshots).at(-1) as string;
    expect(sent(result)).toEqual([[newest, day(2)]]);
    expect(result.stderr).not.toMatch(UNRELATED);
    expectSameTree(join(snapshots, newest), join(destination, newest));
  });
});

describe("copy", () => {
  /** Backups of some days, each a difference to the one before, or in full. */
  async function line(...days: [number, "full" | "difference"][]) {
    const it = pair();
    for (const [n, how] of days) {
      next(it.source, n, `mv plain/${n} plain/moved-${n}`);
      await send(it.source, it.destination, {}, how === "full" ? ["-I"] : []);
    }
    const second = join(filesystem().path, "second");
    const copy = () => expectRun(0, ["copy", "--json", it.destination, second]);
    const expectCopied = (n: number) =>
      expectSameTree(join(it.destination, day(n)), join(second, day(n)));
    return { ...it, second, copy, expectCopied };
  }

  test("sends a backup in full that was received in full, whatever else is shared", async () => {
    const { copy, expectCopied } = await line([1, "full"], [2, "full"]);
    const result = await copy();
    expect(sent(result)).toEqual([
      [day(1), null],
      [day(2), null],
    ]);
    expect(result.stderr).toMatch(UNRELATED);
    for (const n of [1, 2]) expectCopied(n);
  });

  test("sends a difference within each line of backups, and none between two lines", async () => {
    const { copy, expectCopied } = await line(
      [1, "full"],
      [2, "difference"],
      [3, "full"],
      [4, "difference"],
    );
    expect(sent(await copy())).toEqual([
      [day(1), null],
      [day(2), day(1)],
      [day(3), null],
      [day(4), day(3)],
    ]);
    for (const n of [1, 2, 3, 4]) expectCopied(n);
  });

  test("sends differences along a line of backups that were received one on top of the other", async () => {
    const { copy, expectCopied } = await line([1, "full"], [2, "difference"], [3, "difference"]);
    expect(sent(await copy())).toEqual([
      [day(1), null],
      [day(2), day(1)],
      [day(3), day(2)],
    ]);
    for (const n of [1, 2, 3]) expectCopied(n);
  });

  test.each(["by hand", "by retention"])(
    "sends a difference over a gap in the line, which was made %s",
    async (how) => {
      const { source, destination, copy, expectCopied } = await line([1, "full"]);
      expect(sent(await copy())).toEqual([[day(1), null]]);
      for (const n of [2, 3, 4]) {
        next(source, n, `mv plain/${n} plain/moved-${n}`);
        await send(source, destination, {}, how === "by retention" ? ["-n", "1", "-N", "1"] : []);
      }
      if (how === "by hand")
        sh(`btrfs -q subvolume delete "$1/$2" "$1/$3" >/dev/null`, destination, day(2), day(3));
      expect(snapshotNames(destination)).toEqual([day(1), day(4)]);
      expect(sent(await copy())).toEqual([[day(4), day(1)]]);
      expectCopied(4);
    },
  );
});

describe("a parent that is not what it should be at the destination", () => {
  /** What a later difference needs of it, and how it changes that. */
  const MISSING: [string, string][] = [
    ["a file that is removed", "rm plain/10"],
    ["a file that is changed", "echo x >>plain/10"],
    ["a file that moves", "mv plain/10 empty/10"],
  ];

  const spoil = (backup: string) => damage(backup, "rm plain/10");

  function expectNamed({ stderr }: Result, n: number): void {
    expect(stderr).toContain(day(n));
    expect(stderr).toContain("verify");
  }

  test.each(MISSING)(
    "keeps no backup from being made, in full where there is no other (it lacks %s)",
    async (_, change) => {
      const { source, destination, snapshots, snapshot, backup } = await backedUp(1);
      spoil(backup(1));
      next(source, 2, change);
      const result = await send(source, destination);
      expect(sent(result)).toEqual([[day(2), null]]);
      expectSameTree(snapshot(2), backup(2));
      const uuid = subvolumes(snapshots).get(day(2))?.uuid as string;
      expect(subvolumes(destination).get(day(2))).toMatchObject({
        readonly: true,
        receivedUuid: uuid,
      });
      expectNamed(result, 1);
      next(source, 3);
      const after = await send(source, destination);
      expect(sent(after)).toEqual([[day(3), day(2)]]);
      expectSameTree(snapshot(3), backup(3));
    },
  );

  test.each(MISSING)(
    "is replaced by an earlier one that is shared (it lacks %s)",
    async (_, change) => {
      const { source, destination, snapshot, backup } = await backedUp(1, 2);
      spoil(backup(2));
      next(source, 3, change);
      const result = await send(source, destination);
      expect(sent(result)).toEqual([[day(3), day(1)]]);
      expectSameTree(snapshot(3), backup(3));
      expectNamed(result, 2);
      expect(snapshotNames(destination)).toEqual([day(1), day(2), day(3)]);
    },
  );

  test("is found by the verify that was proposed", async () => {
    const { source, destination, backup } = await backedUp(1);
    spoil(backup(1));
    next(source, 2, "rm plain/10");
    await send(source, destination);
    await expectRun(0, ["verify", source, destination]);
    const { stdout } = await expectRun(1, [
      "verify",
      "--json",
      "--snapshot",
      day(1),
      source,
      destination,
    ]);
    expect(events({ stdout } as Result).find(({ event }) => event === "verify")).toMatchObject({
      name: day(1),
      equal: false,
    });
  });

  test("keeps no backup from being made over ssh, and the other destination of the run gets its difference", async () => {
    const { source, destination, snapshot, backup } = await backedUp(1);
    const { options, url } = await sshServer();
    const third = join(filesystem().path, "third");
    await send(source, third);
    await send(source, url(destination), {}, [...options, "--adopt"]);
    spoil(backup(1));
    next(source, 2, "rm plain/10");
    const result = await expectRun(0, [
      "-S",
      "--json",
      ...options,
      source,
      url(destination),
      third,
    ]);
    const parents = new Map(transfers(result).map(({ destination: to, parent }) => [to, parent]));
    expect(parents).toEqual(
      new Map([
        [url(destination), null],
        [third, day(1)],
      ]),
    );
    for (const place of [destination, third]) expectSameTree(snapshot(2), join(place, day(2)));
    expectNamed(result, 1);
  });

  test("is not blamed for a destination that is full: this fails once, and says so", async () => {
    const { source } = pair();
    const small = filesystem({ size: "150M", mkfs: ["-m", "single"] });
    const destination = join(small.path, "backup");
    next(source, 1);
    await send(source, destination);
    next(source, 2, "head -c 200M /dev/urandom >large");
    const watch = watched();
    const { stderr } = await expectRun(1, ["-S", "--skip-space-check", source, destination], watch);
    expect(stderr).toContain("No space left on device");
    expect(stderr).not.toContain("verify");
    expect(watch.receives()).toBe(1);
    expect(snapshotNames(destination)).toEqual([day(1)]);
  });

  test("is not blamed for a send that fails: what follows is not sent in full", async () => {
    const { source, destination } = await backedUp(1);
    next(source, 2);
    const tools = temporaryDirectory();
    first(tools, "btrfs", `case "$1" in send) echo "ERROR: no luck" >&2; exit 1;; esac`);
    const { stderr } = await expectRun(1, ["-S", source, destination], { env: pathWith(tools) });
    expect(stderr).toContain("no luck");
    expect(stderr).not.toContain("in full");
    expect(stderr).not.toContain("verify");
    expect(snapshotNames(destination)).toEqual([day(1)]);
  });

  test("keeps no copy from being made", async () => {
    const { source, destination } = await backedUp(1, 2);
    const second = join(filesystem().path, "second");
    await expectRun(0, ["copy", destination, second]);
    spoil(join(second, day(2)));
    next(source, 3, "rm plain/10");
    await send(source, destination);
    const result = await expectRun(0, ["copy", "--json", destination, second]);
    expect(sent(result)).toEqual([[day(3), day(1)]]);
    expectSameTree(join(destination, day(3)), join(second, day(3)));
    expectNamed(result, 2);
    // With nothing else that is shared.
    sh(`btrfs -q subvolume delete "$1/$2" "$1/$3" >/dev/null`, second, day(1), day(2));
    damage(join(second, day(3)), "rm plain/11");
    next(source, 4, "rm plain/11");
    await send(source, destination);
    const full = await expectRun(0, ["copy", "--json", "--newest-only", destination, second]);
    expect(sent(full)).toEqual([[day(4), null]]);
    expectSameTree(join(destination, day(4)), join(second, day(4)));
    expectNamed(full, 3);
  });

  test("keeps nothing from being restored", async () => {
    const { source, destination, backup } = await backedUp(1);
    next(source, 2, "rm plain/10");
    await send(source, destination);
    const flat = filesystem();
    sh(`btrfs send -q "$1" | btrfs receive -q "$2"`, backup(1), flat.path);
    spoil(join(flat.path, day(1)));
    const target = join(flat.path, "home");
    const result = await expectRun(0, [
      "restore",
      "--json",
      "--snapshot",
      day(2),
      destination,
      target,
    ]);
    expect(contentsDigest(target)).toBe(contentsDigest(backup(2)));
    expect(treeDigest(join(target, "snapshot", day(2)))).toBe(treeDigest(backup(2)));
    expectNamed(result, 1);
  });
});
