// A whole tree in one run: SOURCE and the subvolumes below it, at one moment, each in a folder of its
// own on both sides.

import { expect, test } from "bun:test";
import { spawnSync } from "node:child_process";
import {
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  rmSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { dirname, join } from "node:path";
import { ignoreRule, isExcluded } from "../btrfs-backup.ts";
import { generator, seeded, soak } from "./support/random.ts";
import {
  change,
  events,
  expectRun,
  expectSameTree,
  expectSound,
  fill,
  filesystem,
  holdLock,
  nextSecond,
  pair,
  run,
  s3Remote,
  sh,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  temporaryDirectory,
  transfers,
  treeDigest,
  logged,
} from "./support/rig.ts";

const ODD = "var/lib/a/$(odd) 'näme' !*";
const MEMBERS = ["srv", "var/lib/a", ODD, "var/lib/b"];

/** A source with subvolumes below it, and a destination. */
function tree() {
  const made = pair();
  mkdirSync(join(made.source, "var/lib"), { recursive: true });
  for (const [i, path] of MEMBERS.entries()) fill(subvolume(join(made.source, path)), i + 10);
  return made;
}

const record = (folder: string) => readFileSync(join(folder, ".btrfs-backup.json"), "utf8");
const remove = (path: string) => sh(`btrfs -q subvolume delete "$1"`, path);

/** All of a tree has the same names on both sides, and the same contents. */
function expectTree(snapshots: string, destination: string, paths: readonly string[]): void {
  const names = snapshotNames(snapshots);
  for (const path of ["", ...paths]) {
    expect({ path, names: snapshotNames(join(snapshots, path)) }).toEqual({ path, names });
    expect({ path, names: snapshotNames(join(destination, path)) }).toEqual({ path, names });
    expectSound(join(destination, path), join(snapshots, path));
  }
}

test("SOURCE and all below it: one name, one moment, one hook; then only differences, and retention for each", async () => {
  const { source, snapshots, destination, b } = tree();
  const hooks = join(temporaryDirectory(), "hooks");
  // Left out: what is read-only, what another mount hides, what is excluded, and our own snapshots.
  sh(`btrfs -q subvolume snapshot -r "$1/srv" "$1/frozen"`, source);
  for (const path of ["hidden", "var/cache", "var/lib/docker/1", "var/lib/docker/2/3"]) {
    mkdirSync(join(source, path, ".."), { recursive: true });
    subvolume(join(source, path));
  }
  sh(`mount -t tmpfs none "$1"`, join(source, "hidden"));
  const options = ["--recursive", "--exclude", "var/lib/docker/**", "--exclude", "cache"];
  const hooked = ["--before-snapshot", `echo before >>${hooks}`];
  const first = await expectRun(0, [...options, ...hooked, source, destination]);
  expect(first.stderr).toMatch(/Took 5 snapshots \d{8}-\d{6} of .*, within \d+ ms/);
  expect(first.stderr).not.toContain("not part of its snapshots");
  expect(readFileSync(hooks, "utf8")).toBe("before\n");
  expectTree(snapshots, destination, MEMBERS);
  expect(sh(`cd "$1"; find . -name '2*-*' -inum 256 | wc -l`, b.path)).toBe("5");
  // Nothing was written into what is below.
  for (const path of MEMBERS) expect(existsSync(join(source, path, "snapshot"))).toBe(false);

  for (let i = 0; i < 2; i++) {
    await nextSecond();
    change(join(source, "srv"), generator(i));
    const again = await expectRun(0, [
      ...options,
      "--json",
      "-N",
      "2",
      "-n",
      "2",
      source,
      destination,
    ]);
    expect(transfers(again).map(({ parent }) => parent !== null)).toEqual(Array(5).fill(true));
    expect(new Set(transfers(again).map((one) => one["destination"]))).toEqual(
      new Set([destination]),
    );
    expect(
      transfers(again)
        .map((one) => one["subvolume"] ?? "")
        .sort(),
    ).toEqual(["", ...MEMBERS].sort());
  }
  expect(snapshotNames(destination).length).toBe(2);
  expectTree(snapshots, destination, MEMBERS);
  const summary = (await expectRun(0, ["--recursive", "-S", source, destination])).stderr;
  expect(summary).toContain("3 subvolumes came: var/cache");
  sh(`umount "$1"`, join(source, "hidden"));
});

test("what came, went and was made anew", async () => {
  const { source, snapshots, destination, b } = tree();
  const raw = `raw://${join(b.path, "raw")}`;
  await expectRun(0, ["--recursive", source, destination, raw]);
  const [first = ""] = snapshotNames(destination);
  remove(join(source, "srv"));
  remove(join(source, "var/lib/b"));
  fill(subvolume(join(source, "var/lib/b")), 77);
  fill(subvolume(join(source, "new")), 78);
  await nextSecond();
  const second = await expectRun(0, [
    "--recursive",
    "-n",
    "1",
    "-N",
    "1",
    source,
    destination,
    raw,
  ]);
  expect(second.stderr).toContain("1 subvolume is not there any more: srv; the backups stay");
  expect(second.stderr).toContain("1 subvolume came: new");
  expect(second.stderr).toContain("another subvolume is at");
  const [name = ""] = snapshotNames(destination);
  for (const folder of [snapshots, destination])
    expect(record(folder)).toContain(`"tree":{"gone":{"srv":"${name}"}}`);
  const stored = (path: string) =>
    readdirSync(join(b.path, "raw", path)).filter((one) => one.endsWith(".btrfs")).length;
  expect([stored("srv"), stored("var/lib/b")]).toEqual([1, 2]);
  const restored = join(b.path, "restored");
  await expectRun(0, ["restore", `${raw}/var/lib/b`, restored]);
  expectSameTree(join(source, "var/lib/b", "plain"), join(restored, "plain"));
  // What went keeps its backups; so does what stood in the place of what was made anew.
  expect(snapshotNames(join(destination, "srv"))).toEqual([first]);
  expect(snapshotNames(join(destination, "var/lib/b"))).toEqual([first, name]);
  expect(snapshotNames(join(destination, "var/lib/a"))).toEqual([name]);
  expectSameTree(join(source, "var/lib/b"), join(destination, "var/lib/b", name));
  expectSameTree(join(source, "new"), join(destination, "new", name));
  const checked = await expectRun(0, ["check", "--recursive", source, destination]);
  expect(checked.stdout).toMatch(
    /ok +nested .*: 4 subvolumes below it are backed up with it; not there any more: srv/,
  );
  await nextSecond();
  const third = await expectRun(0, ["--recursive", "--json", "-n", "1", source, destination]);
  expect(transfers(third).map(({ parent }) => parent)).toEqual(Array(5).fill(name));
  expect(third.stderr).not.toContain("not there any more");
  expect(snapshotNames(join(destination, "var/lib/b")).length).toBe(2); // the stranger, and the newest
  // It is back, as another one.
  fill(subvolume(join(source, "srv")), 79);
  await nextSecond();
  await expectRun(0, ["--recursive", source, destination]);
  expect(record(destination)).toContain(`"tree":{"gone":{}}`);
  expect(snapshotNames(join(destination, "srv")).length).toBe(2);
});

test("a subvolume that vanishes, one whose folder cannot be made, and a line break: that one's error", async () => {
  const { source, snapshots, destination } = tree();
  subvolume(join(source, "bad\nname"));
  mkdirSync(join(snapshots, "var/lib"), { recursive: true });
  writeFileSync(join(snapshots, "var/lib/b"), "in the way");
  const vanishing = `btrfs subvolume delete ${join(source, "srv")}`;
  const { stderr } = await expectRun(1, [
    "--recursive",
    "--before-snapshot",
    vanishing,
    source,
    destination,
  ]);
  expect(stderr).toContain("srv: no snapshot: it is not there any more");
  expect(stderr).toMatch(/var\/lib\/b: .*cannot create/);
  expect(stderr).toContain("there is a line break in its path");
  rmSync(join(snapshots, "var/lib/b"));
  for (const path of ["", "var/lib/a", ODD]) {
    expect(snapshotNames(join(destination, path)).length).toBe(1);
    expectSound(join(destination, path), join(snapshots, path));
  }
  expect(existsSync(join(destination, "srv"))).toBe(false);
});

test("to every kind of destination at once, over one connection; and a dry run changes nothing", async () => {
  const { source, b } = tree();
  const [{ options, url }, s3] = [await sshServer(), await s3Remote()];
  const out = temporaryDirectory();
  const command = `mkdir -p "${out}/$BTRFS_BACKUP_PATH"; cat >"${out}/$BTRFS_BACKUP_PATH/$BTRFS_BACKUP_NAME"`;
  const raw = join(b.path, "raw");
  const stores = [`raw://${raw}`, `raw+${url(join(b.path, "far"))}`, s3.url("tree")];
  const places = [join(b.path, "one"), url(join(b.path, "two")), ...stores, `shell://${command}`];
  const all = ["--recursive", ...options, source, ...places];
  const dry = await expectRun(0, ["--dry-run", ...all], { env: s3.env });
  expect(dry.stderr).toContain(`Would send`);
  expect(sh(`ls "$1"`, b.path)).toBe("");
  expect(existsSync(join(source, "snapshot"))).toBe(false);
  for (let i = 0; i < 2; i++) {
    await nextSecond();
    change(join(source, ODD), generator(i));
    const told = await expectRun(0, ["--json", ...all], { env: s3.env });
    expect(transfers(told).length).toBe(5 * 6);
    expect(transfers(told).filter(({ parent }) => parent === null).length).toBe(i === 0 ? 30 : 0);
  }
  const [, last = ""] = snapshotNames(join(b.path, "one"));
  for (const path of ["", ...MEMBERS]) {
    expectSound(join(b.path, "one", path), join(source, "snapshot", path));
    expectSound(join(b.path, "two", path), join(source, "snapshot", path));
    expect(statSync(join(out, path, last)).size).toBeGreaterThan(100);
    for (const store of stores) {
      const restored = join(b.path, "restored");
      const from = `${store}${path === "" ? "" : `/${path}`}`;
      if (path === ODD)
        await expectRun(0, ["restore", ...options, from, restored], { env: s3.env });
      if (!existsSync(restored)) continue;
      expectSameTree(join(source, "snapshot", path, last, "plain"), join(restored, "plain"));
      sh(`btrfs -q subvolume delete "$1"/snapshot/2* "$1"`, restored);
    }
  }
});

test("the places of one host are opened one after another: the connection of a short command would wait for other places' locks", async () => {
  const { source, b } = tree();
  const { options, url } = await sshServer();
  const tools = temporaryDirectory();
  const log = join(tools, "log");
  writeFileSync(
    join(tools, "ssh"),
    `#!/bin/bash\ncase $* in *btrfs-backup:open\\'*|*btrfs-backup:create\\'*) case $* in *"/one'"*) echo one;; *"/two'"*) echo two;; esac >>${log};; esac\nexec ${sh("command -v ssh")} "$@"\n`,
    { mode: 0o755 },
  );
  const [one, two] = [join(b.path, "one"), join(b.path, "two")];
  await expectRun(0, ["-q", "--recursive", ...options, source, url(one), `raw+${url(two)}`], {
    env: { PATH: `${tools}:${process.env["PATH"]}` },
  });
  // Each is looked at, made, and locked. The sorted order is that of their names.
  expect(readFileSync(log, "utf8")).toMatch(/^(two\n){3}(one\n)+$|^(one\n){3}(two\n)+$/);
  for (const path of ["", ...MEMBERS]) expectSound(join(one, path), join(source, "snapshot", path));
});

test("a plain directory as SOURCE: only what is below counts", async () => {
  const [a, b] = [filesystem(), filesystem()];
  const lxc = join(a.path, "lxc");
  mkdirSync(lxc);
  for (const name of ["web", "db"]) fill(subvolume(join(lxc, name)));
  const destination = join(b.path, "lxc");
  expect((await expectRun(2, ["--recursive", lxc, destination])).stderr).toContain(
    "-f an absolute path",
  );
  const folder = join(a.path, "snapshots");
  for (let i = 0; i < 2; i++) {
    await expectRun(0, ["--recursive", "-f", folder, lxc, destination]);
    await nextSecond();
  }
  for (const name of ["web", "db"]) {
    expect(snapshotNames(join(destination, name)).length).toBe(2);
    expectSound(join(destination, name), join(folder, name));
  }
  expect(snapshotNames(folder)).toEqual([]);
  for (const place of [folder, destination]) expect(record(place)).toContain(`"tree":{"gone":{}}`);
  expect((await expectRun(2, ["--exclude", "x", lxc])).stderr).toContain(
    "--exclude needs --recursive",
  );
});

test("a plain directory: nothing below it is no success; an optional disk that is away, and another disk, are told once", async () => {
  const [a, b, c] = [filesystem(), filesystem(), filesystem()];
  const [lxc, empty, disk] = [join(a.path, "lxc"), join(a.path, "empty"), temporaryDirectory()];
  for (const path of [lxc, empty]) mkdirSync(path);
  fill(subvolume(join(lxc, "web")));
  const [folder, destination] = [join(a.path, "snapshots"), join(disk, "lxc")];
  const gone = temporaryDirectory(); // not on btrfs, where nothing is made
  const nothing = await expectRun(1, ["--recursive", "-f", folder, empty, join(b.path, "x")]);
  expect(nothing.stderr).toContain("there is no subvolume below it");
  for (const around of [lxc, a.path])
    expect((await expectRun(2, ["--recursive", "-f", around, lxc])).stderr).toContain(
      "or above it",
    );
  const named = await expectRun(2, ["--recursive", "--locked-dests", "-f", folder, lxc]);
  expect(named.stderr).toContain("--locked-dests contradict each other");

  sh(`mount --bind "$1" "$2"`, b.path, disk);
  const away = ["--optional", join(gone, "a/b"), "--optional", join(gone, "z/y")];
  const args = ["--recursive", "--quiet", "-f", folder, lxc, destination];
  for (const how of ["binary", "deno"] as const) {
    const quiet = await expectRun(0, [...args, ...away], { how });
    expect([how, quiet.stderr]).toEqual([how, ""]);
    await nextSecond();
  }
  expect(snapshotNames(join(destination, "web")).length).toBe(2);
  sh(`umount "$2"; mount --bind "$1" "$2"`, c.path, disk);
  const other = await expectRun(1, args);
  expect(logged(other.stderr).match(/lies on another filesystem/g)?.length).toBe(1);
  expect(existsSync(join(destination, ".btrfs-backup.json"))).toBe(false);
  sh(`umount "$1"`, disk);
});

test("where another subvolume stood for a time, the former one goes on with its own", async () => {
  const { source, snapshots, destination } = tree();
  const args = ["--recursive", "--json", "-N", "1", "-n", "1", source, destination];
  await expectRun(0, args);
  sh(`mv "$1/srv" "$1/old"`, source);
  fill(subvolume(join(source, "srv")), 70);
  await nextSecond();
  await expectRun(0, args);
  const [first = "", second = ""] = snapshotNames(join(destination, "srv"));
  const other = treeDigest(join(destination, "srv", second));
  remove(join(source, "srv"));
  sh(`mv "$1/old" "$1/srv"`, source);
  await nextSecond();
  const back = await expectRun(0, args);
  const sent = transfers(back).filter((one) => one["subvolume"] === "srv");
  expect(sent.map(({ parent }) => parent)).toEqual([first]);
  // What is its own goes as its policy says; what the other one left is never deleted.
  for (const place of [snapshots, destination]) {
    const names = snapshotNames(join(place, "srv"));
    expect([names.length, names[0]]).toEqual([2, second]);
  }
  expect(treeDigest(join(destination, "srv", second))).toBe(other);
  expectSound(join(destination, "srv"), join(snapshots, "srv"));
  // A path can have any name.
  const restored = join(dirname(destination), "restored");
  subvolume(join(source, "constructor"));
  await nextSecond();
  await expectRun(0, args);
  await expectRun(0, ["restore", "--recursive", destination, restored]);
  expect(treeDigest(join(restored, "srv", "plain"))).toBe(treeDigest(join(source, "srv", "plain")));
  expect(existsSync(join(restored, "constructor"))).toBe(true);
});

test("however many went, the root is backed up", async () => {
  const { source, snapshots, destination } = tree();
  await expectRun(0, ["--recursive", source, destination]);
  const gone = Array.from({ length: 900 }, (_, i) => [
    `var/lib/containers/${String(i).padStart(80, "0")}`,
    "20260101-000000",
  ]);
  for (const folder of [snapshots, destination]) {
    const many = `"tree":{"gone":${JSON.stringify(Object.fromEntries(gone))}}`;
    writeFileSync(
      join(folder, ".btrfs-backup.json"),
      record(folder).replace(`"tree":{"gone":{}}`, many),
    );
  }
  await nextSecond();
  await expectRun(0, ["--recursive", source, destination]);
  expect(snapshotNames(destination).length).toBe(2);
  expect(record(destination)).toContain(`/${"0".repeat(80)}":"20260101-000000"`);
  expect(record(destination).length).toBeLessThan(40_000);
});

test("one that has snapshots of its own keeps its folder", async () => {
  const { source, snapshots, destination } = tree();
  await expectRun(0, [join(source, "srv"), join(destination, "..", "single")]);
  const own = join(source, "srv", "snapshot");
  const [before = ""] = snapshotNames(own);
  await nextSecond();
  await expectRun(0, ["--recursive", source, destination]);
  const [name = ""] = snapshotNames(snapshots);
  expect(snapshotNames(own)).toEqual([before, name]);
  expect(existsSync(join(snapshots, "srv"))).toBe(false);
  expect(snapshotNames(join(destination, "srv"))).toEqual([before, name]);
  expectSound(join(destination, "srv"), own);
  // In one run of all files, the tree and its member wait for each other.
  const directory = temporaryDirectory();
  writeFileSync(join(directory, "a.args"), `--recursive\n${source}\n${destination}\n`);
  const single = join(destination, "..", "single");
  writeFileSync(join(directory, "b.args"), `${join(source, "srv")}\n${single}\n`);
  for (let i = 0; i < 2; i++) await expectRun(0, ["all", "--config-dir", directory]);
  expect(snapshotNames(single).length).toBeGreaterThan(2);
});

test("who holds one folder of the tree holds all; and a member alone goes on with its chain", async () => {
  const { source, snapshots, destination } = tree();
  await expectRun(0, ["--recursive", source, destination]);
  const release = await holdLock(join(destination, "srv", ".btrfs-backup..lock"));
  await nextSecond();
  const busy = await run(["--recursive", source, destination]);
  expect(busy.status).toBe(1);
  expect(busy.stderr).toContain("another run holds");
  await release();
  await nextSecond();
  const alone = [
    "--json",
    "-f",
    join(snapshots, "srv"),
    join(source, "srv"),
    join(destination, "srv"),
  ];
  const first = snapshotNames(snapshots)[0] ?? "";
  // What could not be sent while the destination was locked goes with it.
  expect(transfers(await expectRun(0, alone)).map(({ parent }) => parent !== null)).toEqual([
    true,
    true,
  ]);
  expect(snapshotNames(join(destination, "srv"))[0]).toBe(first);
  await nextSecond();
  const all = await expectRun(0, ["--recursive", "--json", source, destination]);
  expect(transfers(all).every(({ parent }) => parent !== null)).toBe(true);
  for (const path of MEMBERS) expectSound(join(destination, path), join(snapshots, path));
});

test("a guarded key may do so below its --path, and pull so", async () => {
  const { source, snapshots, destination, b } = tree();
  const { guarded, url } = await sshServer();
  const home = join(b.path, "laptop");
  mkdirSync(home);
  for (let i = 0; i < 2; i++) {
    const pushing = guarded("--path", home);
    await expectRun(0, ["--recursive", ...pushing, source, url(join(home, "tree"))]);
    await nextSecond();
  }
  expectTree(snapshots, join(home, "tree"), MEMBERS);
  const refused = await expectRun(1, [
    "--recursive",
    ...guarded("--path", join(home, "tree")),
    source,
    url(join(home, "other")),
  ]);
  expect(refused.stderr).toContain("is not below");
  expect(existsSync(join(home, "other"))).toBe(false);

  const pulling = guarded("--path", source, "--source");
  for (let i = 0; i < 2; i++) {
    const pulled = await expectRun(0, [
      "--recursive",
      "--json",
      "-N",
      "3",
      ...pulling,
      url(source),
      destination,
    ]);
    expect(transfers(pulled).length).toBe(i === 0 ? 20 : 5);
    await nextSecond();
  }
  for (const path of ["", ...MEMBERS]) {
    expect(snapshotNames(join(snapshots, path)).length).toBe(4); // one is the other destination's pin
    expectSound(join(destination, path), join(snapshots, path));
  }
});

test("an optional destination that is away is skipped once, and one that fails is told once", async () => {
  const { source, destination, b } = tree();
  // Nothing at all was reached, and nobody has heard of that place before.
  const unknown = ["--recursive", "--if-reachable", "-q", source, "rclone://nowhere:bucket"];
  expect((await expectRun(1, unknown)).stderr).toContain("rclone://nowhere:bucket");
  await expectRun(0, ["--recursive", source, destination, join(b.path, "second")]);
  sh(
    `find "$1" -inum 256 -name "2*" -prune -exec btrfs -q subvolume delete {} +; rm -r "$1"`,
    join(b.path, "second"),
  );
  await nextSecond();
  const gone = await run([
    "--recursive",
    source,
    destination,
    "--optional",
    join(b.path, "second"),
  ]);
  expect(gone.stderr.split("Skipping").length).toBe(2);
  expect(gone.status).toBe(0);
  await nextSecond();
  const failed = await run(["--recursive", source, destination, join(b.path, "second")]);
  expect(failed.status).toBe(1);
  expect(failed.stderr.split("\n").filter((line) => line.startsWith("[error]")).length).toBe(1);
  expect(snapshotNames(join(destination, ODD)).length).toBe(3);
});

test("--exclude means what gitignore(5) says: git decides the same of random patterns and paths", () => {
  const repository = temporaryDirectory();
  sh(`git init -q "$1"`, repository);
  const random = seeded();
  const pick = <T>(all: readonly T[]) => all[Math.floor(random() * all.length)] as T;
  const some = (most: number) => 1 + Math.floor(random() * most);
  const name = () => Array.from({ length: some(2) }, () => pick([..."ab.c-"])).join("");
  const piece = () =>
    pick([
      name(),
      name(),
      "*",
      "**",
      "?",
      "a*",
      "*b",
      "[ab]",
      "[!a]",
      "[^b]c",
      "[a-c]*",
      "\\a",
      "a\\*",
      "[[:alpha:]]",
    ]);
  for (let i = 0; i < soak(60); i++) {
    const patterns = Array.from({ length: some(3) }, () => {
      const body = Array.from({ length: some(3) }, piece).join("/");
      return pick(["", "", "", "!"]) + pick(["", "", "/"]) + body + pick(["", "", "/"]);
    });
    const paths = [
      ...new Set(Array.from({ length: 25 }, () => Array.from({ length: some(4) }, name).join("/"))),
    ].filter((path) => !/(^|\/)\.{1,2}(\/|$)|(^|\/)\.git(\/|$)/.test(path));
    writeFileSync(join(repository, ".git/info/exclude"), `${patterns.join("\n")}\n`);
    sh(`cd "$1"; shift; mkdir -p -- "$@"`, repository, ...paths);
    const asked = ["-C", repository, "check-ignore", "--no-index", "--stdin"];
    const { stdout } = spawnSync("git", asked, {
      input: `${paths.join("\n")}\n`,
      encoding: "utf8",
    });
    sh(`cd "$1"; rm -rf -- ./[!.]*`, repository);
    const ignored = stdout.split("\n").filter((line) => line !== "");
    const rules = patterns.flatMap((pattern) => ignoreRule(pattern) ?? []);
    const ours = paths.filter((path) => isExcluded(path, rules));
    expect({ patterns, ignored: ours }).toEqual({ patterns, ignored });
  }
});

test("subvolumes that come, go, move and are made anew, and runs that are killed: no chain mixes", async () => {
  const random = seeded();
  const pick = <T>(all: readonly T[]) => all[Math.floor(random() * all.length)] as T;
  const { source, snapshots, destination } = pair();
  const names = ["a", "b", "b/c", "b/c/d", "e e", "f/g", "f/h"];
  const foreign = [snapshots, destination].map((folder) => {
    mkdirSync(join(folder, "a"), { recursive: true });
    return subvolume(join(folder, "a", "foreign"));
  });
  const uuids = () => foreign.map((path) => sh(`btrfs subvolume show "$1" | grep UUID`, path));
  const [before, states] = [uuids(), new Map<string, string>()];
  const isThere = (path: string) => existsSync(join(source, path, "state"));
  const gone = (path: string) =>
    sh(`find "$1" -depth -inum 256 -exec btrfs -q subvolume delete {} ";"`, join(source, path));
  // A plain directory that holds a subvolume stays: where one goes, btrfs send leaves an empty
  // directory behind.
  const canStand = (path: string) => !path.startsWith("b/") || isThere(join(path, ".."));
  const mutate = (round: number) => {
    const path = pick(names);
    const deed = pick(["come", "come", "go", "move", "anew"]);
    const to = pick(names.filter((one) => !one.startsWith(path) && !path.startsWith(one)));
    mkdirSync(join(source, "f"), { recursive: true });
    if (isThere(path) && deed === "move" && canStand(to) && !existsSync(join(source, to)))
      sh(`mkdir -p "$(dirname "$2")"; mv -T "$1" "$2"`, join(source, path), join(source, to));
    else if (isThere(path) && (deed === "go" || deed === "anew")) gone(path);
    if ((deed === "come" || deed === "anew") && canStand(path) && !existsSync(join(source, path))) {
      mkdirSync(join(source, path, ".."), { recursive: true });
      subvolume(join(source, path));
    }
    for (const one of names.filter((name) => existsSync(join(source, name))))
      if (statSync(join(source, one)).ino === 256 && (random() < 0.5 || !isThere(one)))
        writeFileSync(join(source, one, "state"), `${one} ${round} ${random()}`);
  };
  const rounds = soak(4);
  for (let round = 0; round < rounds; round++) {
    for (let i = 0; i < 3; i++) mutate(round);
    await nextSecond();
    const args = ["--recursive", "--json", "-N", "3", "-n", "4", source, destination];
    if (random() < 0.3) {
      const running = start(args);
      await Bun.sleep(random() * 400); // a random moment of the run
      running.child.kill("SIGKILL");
      await running.finished;
      await nextSecond();
    }
    const there = new Map(
      names
        .filter(isThere)
        .map((path) => [path, readFileSync(join(source, path, "state"), "utf8")]),
    );
    const told = await expectRun(0, [...args, "--wait", "30"]);
    const name = events(told).find(({ event }) => event === "snapshot")?.["name"] as string;
    for (const [path, state] of there) states.set(`${path}/${name}`, state);
    for (const path of there.keys()) {
      expectSound(join(destination, path), join(snapshots, path));
      expect(snapshotNames(join(destination, path))).toContain(name);
    }
  }
  for (const [place, state] of states)
    if (existsSync(join(destination, place)))
      expect(readFileSync(join(destination, place, "state"), "utf8")).toBe(state);
  expect(uuids()).toEqual(before);
  // The restored tree is the source of that moment.
  const restored = join(dirname(destination), "restored");
  await expectRun(0, ["restore", "--recursive", destination, restored]);
  for (const path of names) {
    const state = isThere(path) ? readFileSync(join(source, path, "state"), "utf8") : null;
    const found = join(restored, path, "state");
    expect([path, existsSync(found) ? readFileSync(found, "utf8") : null]).toEqual([path, state]);
  }
});

test("after a restore of the whole tree, the next run is incremental everywhere", async () => {
  const { source, snapshots, destination } = tree();
  await expectRun(0, ["--recursive", source, destination]);
  const states = MEMBERS.map((path) => treeDigest(join(source, path, "plain")));
  change(join(source, "srv"), generator(1));
  remove(join(source, "var/lib/b"));
  await expectRun(0, ["restore", "--recursive", "--replace", destination, source]);
  expect(MEMBERS.map((path) => treeDigest(join(source, path, "plain")))).toEqual(states);
  await nextSecond();
  const told = await expectRun(0, ["--recursive", "--json", source, destination]);
  expect(transfers(told).map(({ parent }) => parent !== null)).toEqual(Array(5).fill(true));
  expect(told.stderr).not.toContain("[warn]");
  for (const path of MEMBERS) expectSound(join(destination, path), join(snapshots, path));
});

test("a moved subvolume is a new path, incremental; through a guarded key, which allows no parent elsewhere, in full", async () => {
  const { source, snapshots, destination } = tree();
  const { guarded, url } = await sshServer();
  const home = filesystem().path;
  const far = [...guarded("--path", home), url(join(home, "tree"))];
  await expectRun(0, ["--recursive", source, destination, ...far]);
  sh(`mv "$1/srv" "$1/var/moved"`, source);
  for (const parents of [2, 1]) {
    await nextSecond();
    const told = await expectRun(0, ["--recursive", "--json", source, destination, ...far]);
    const moved = transfers(told).filter((one) => one["subvolume"] === "var/moved");
    expect(moved.filter(({ parent }) => parent !== null).length).toBe(parents === 2 ? 1 : 2);
  }
  for (const place of [destination, join(home, "tree")]) {
    expect(snapshotNames(join(place, "var/moved")).length).toBe(2);
    expect(snapshotNames(join(place, "srv")).length).toBe(1);
    expectSound(join(place, "var/moved"), join(snapshots, "var/moved"));
  }
});

test("--if-changed: only what has changed gets a snapshot, and what is still in memory counts", async () => {
  const { source, snapshots, destination } = tree();
  const args = ["--recursive", "--if-changed", "--json", source, destination];
  await expectRun(0, args);
  const names = (path: string) => snapshotNames(join(destination, path)).length;
  await nextSecond();
  const idle = await expectRun(0, args);
  expect(["", ...MEMBERS].map(names)).toEqual([1, 1, 1, 1, 1]);
  expect(events(idle).filter(({ event }) => event === "snapshot")).toEqual([]);
  writeFileSync(join(source, ODD, "fresh"), "x");
  sh(`touch "$1"; chmod 700 "$1"; chmod 755 "$1"`, join(source, "srv")); // new generations, no change but times
  await nextSecond();
  const told = await expectRun(0, args);
  expect(told.stderr).toContain("Nothing has changed in");
  expect(transfers(told).map((one) => one["subvolume"])).toContain(ODD);
  expect(names(ODD)).toBe(2);
  expect([names("var/lib/a"), names("var/lib/b")]).toEqual([1, 1]);
  for (const path of MEMBERS) expectSound(join(destination, path), join(snapshots, path));
  // Through a guarded key, too, what the run itself writes for the others is no change of the root.
  const { guarded, url } = await sshServer();
  const pulling = [...guarded("--path", source, "--source"), url(source), `${destination}-pulled`];
  for (let i = 0; i < 2; i++) {
    await nextSecond();
    await expectRun(0, ["--recursive", "--if-changed", ...pulling]);
  }
  expect(snapshotNames(`${destination}-pulled`)).toEqual(snapshotNames(destination));
  // An unchanged member stands for itself in a restore, and is not too old.
  const restored = join(dirname(destination), "restored");
  await expectRun(0, ["restore", "--recursive", destination, restored]);
  for (const path of MEMBERS)
    expect(treeDigest(join(restored, path))).toBe(treeDigest(join(source, path)));
});
