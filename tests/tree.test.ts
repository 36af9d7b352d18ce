// A source with subvolumes below it comes back whole, as of one moment, from wherever its backups
// are, and whoever looks at the backups sees which belong together.

import { expect, test } from "bun:test";
import { randomBytes } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import {
  change,
  damage,
  events,
  expectRun,
  fill,
  filesystem,
  holdLock,
  nextSecond,
  pair,
  reformat,
  sh,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  subvolumes,
  temporaryDirectory,
  transfers,
  waitFor,
} from "./support/rig.ts";
import { descendants, signal } from "./support/processes.ts";
import { generator, seeded, soak } from "./support/random.ts";
import { makeTree, stateOf } from "./support/tree.ts";

const [FIRST, SECOND, THIRD] = ["20260101-120000", "20260102-120000", "20260103-120000"] as const;
const DEEP = "var/lib/a/in it/ü 'x' $(y)";

/** What each subvolume of a tree is; those below it by their paths. */
const statesOf = (source: string, members: readonly string[]) =>
  new Map(["", ...members].map((path) => [path, stateOf(join(source, path))]));

/** Every subvolume of a restored tree is writable, as it was, and there is none besides. */
function expectTree(target: string, states: ReadonlyMap<string, string>): void {
  for (const [path, state] of states) {
    const full = join(target, path);
    expect([path, stateOf(full)]).toEqual([path, state]);
    expect(subvolumes(dirname(full)).get(basename(full))).toMatchObject({
      readonly: false,
      receivedUuid: null,
    });
  }
  const found = sh(
    `cd "$1"; find . -mindepth 1 -path ./snapshot -prune -o -inum 256 -type d -printf '%P\\n'`,
    target,
  );
  expect(found.split("\n").filter(Boolean).sort()).toEqual(
    [...states.keys()].filter(Boolean).sort(),
  );
  expect(readdirSync(dirname(target)).filter((entry) => entry.includes(".restoring-"))).toEqual([]);
}

/** Deletes a subvolume, and all below it, the inner ones first. */
const deleteTree = (target: string) =>
  sh(
    `find "$1" -depth -inum 256 -type d -print0 | xargs -0 -n 1 btrfs -q subvolume delete >/dev/null`,
    target,
  );

/** A tree with two runs: one of its subvolumes goes before the second, another comes. */
async function twoRuns(to: (destination: string) => readonly string[]) {
  const { source, destination, a, b } = pair();
  const always = ["var/lib/a", DEEP];
  mkdirSync(join(source, "var/lib"), { recursive: true });
  for (const [i, path] of [...always, "var/old"].entries()) {
    mkdirSync(dirname(join(source, path)), { recursive: true });
    fill(subvolume(join(source, path)), i);
  }
  const destinations = to(destination);
  const states = new Map<string, Map<string, string>>();
  const random = generator(4);
  const go = async (name: string, members: readonly string[], gone = {}) => {
    await makeTree({ source, members, name, destinations, gone });
    states.set(name, statesOf(source, members));
    for (const path of ["", ...always]) change(join(source, path), random);
  };
  await go(FIRST, [...always, "var/old"]);
  sh(`btrfs -q subvolume delete "$1" >/dev/null`, join(source, "var/old"));
  mkdirSync(join(source, "made/later"), { recursive: true });
  fill(subvolume(join(source, "made/later/new")), 9);
  await go(SECOND, [...always, "made/later/new"], { "var/old": SECOND });
  return { source, destination, a, b, states, always };
}

test("the whole disaster: a tree comes back as of its newest run, and each subvolume's next backup is incremental", async () => {
  const store = `raw://${temporaryDirectory()}/store`;
  const { source, destination, a, states } = await twoRuns((place) => [place, store]);
  const members = [...(states.get(SECOND)?.keys() ?? [])].filter(Boolean);
  const { guarded, url, options: free } = await sshServer();
  const options = guarded("--path", destination, "--allow-read");
  const other = filesystem();
  const last = states.get(SECOND) as Map<string, string>;
  // A store does not say what went: that comes back too, and the warning names it.
  const withOld = new Map([...last, ["var/old", states.get(FIRST)?.get("var/old") ?? ""]]);
  for (const [i, [place, expected]] of [
    [destination, last],
    [url(destination), last],
    [store, withOld],
    [source, last],
  ].entries() as Iterable<[number, [string, Map<string, string>]]>) {
    const target = join(i === 3 ? a.path : other.path, `again${i}`);
    // The first one to another host.
    const [key, to] = i === 0 ? [free, url(target)] : [options, target];
    const { stderr } = await expectRun(0, ["restore", "--recursive", ...key, place, to]);
    expectTree(target, expected);
    expect([i, stderr.includes("no backup")]).toEqual([i, place === store]);
    expect([i, stderr.includes(`gone before ${SECOND}: var/old`)]).toEqual([i, place !== store]);
    deleteTree(target);
  }
  reformat(a);
  await expectRun(0, ["restore", "-q", "--recursive", destination, source]);
  expectTree(source, states.get(SECOND) as Map<string, string>);
  for (const path of ["", ...members]) change(join(source, path), generator(5));
  for (const path of ["", ...members]) {
    const folder = join(source, "snapshot", path);
    expect(statSync(join(folder, ".btrfs-backup..lock")).ino).toBe(
      statSync(join(source, "snapshot/.btrfs-backup..lock")).ino,
    );
    const next = await expectRun(0, [
      "--json",
      "-f",
      folder,
      join(source, path),
      join(destination, path),
    ]);
    expect([path, transfers(next)]).toMatchObject([path, [{ parent: SECOND }]]);
  }
  const record = readFileSync(join(source, "snapshot/.btrfs-backup.json"), "utf8");
  expect(record).toContain(`"tree":{"gone":{"var/old":"${SECOND}"}}`);
});

/** A small tree on a filesystem, and a folder for its backups on another one. */
function smallTree(paths: readonly string[], plain = false) {
  const [a, b] = [filesystem(), filesystem()];
  const source = join(a.path, "home");
  if (plain) mkdirSync(source);
  else subvolume(source);
  for (const path of paths) {
    mkdirSync(dirname(join(source, path)), { recursive: true });
    subvolume(join(source, path));
    writeFileSync(join(source, path, "it"), `${path} 1`);
  }
  return { a, b, source, destination: join(b.path, "backup") };
}
const it = (target: string, path: string) => readFileSync(join(target, path, "it"), "utf8");

test("as of which run: --snapshot, --before; what lacks a run gives its newest one before, and what is another source's stays out", async () => {
  const { source, destination, a, b } = smallTree(["x", "y", "y/z"]);
  const run = { source, destinations: [destination] };
  await makeTree({ ...run, members: ["x", "y", "y/z"], name: FIRST });
  for (const path of ["x", "y", "y/z"]) writeFileSync(join(source, path, "it"), `${path} 2`);
  await makeTree({ ...run, members: ["x", "y/z"], name: SECOND });
  // A chain of another source below the same place, a restored copy, and one of another host.
  const stranger = subvolume(join(a.path, "stranger"));
  await expectRun(0, ["-q", stranger, join(destination, "stranger")]);
  await expectRun(0, ["restore", "-q", destination, join(destination, "copy")]);
  const target = join(b.path, "again");
  const restored = async (...args: string[]) => {
    const { stderr } = await expectRun(0, ["restore", "--recursive", ...args, destination, target]);
    expect(stderr).toContain(
      "1 folder below it is another source's, and no part of the tree: stranger",
    );
    const found = ["x", "y", "y/z"].map((path) => it(target, path));
    expect(existsSync(join(target, "stranger"))).toBe(false);
    deleteTree(target);
    return [...found, /no backup \d{8}-\d{6}; .*: (.*)/.exec(stderr)?.[1]];
  };
  expect(await restored()).toEqual(["x 2", "y 1", "y/z 2", "y"]);
  expect(await restored("--snapshot", FIRST)).toEqual(["x 1", "y 1", "y/z 1", undefined]);
  expect(await restored("--before", "2026-01-01 23:00")).toEqual([
    "x 1",
    "y 1",
    "y/z 1",
    undefined,
  ]);
  const dry = await expectRun(0, ["restore", "--recursive", "--dry-run", destination, target]);
  expect(dry.stderr).toContain(`Would restore ${SECOND} from ${destination}/x to ${target}/x`);
  expect(existsSync(target)).toBe(false);
  expect(
    (await expectRun(1, ["restore", "--recursive", "--snapshot", THIRD, destination, target]))
      .stderr,
  ).toContain(`no complete snapshot ${THIRD}`);
  // Without --recursive, it is what it was.
  await expectRun(0, ["restore", "-q", destination, target]);
  expect(existsSync(join(target, "x/it"))).toBe(false);
});

test("a subvolume that was made anew: each run's backups come back, the first one's as well", async () => {
  const { source, destination, b } = smallTree(["x"]);
  const run = { source, destinations: [destination], members: ["x"] };
  await makeTree({ ...run, name: FIRST });
  sh(`btrfs -q subvolume delete "$1" >/dev/null`, join(source, "x"));
  writeFileSync(join(subvolume(join(source, "x")), "it"), "x anew");
  await expectRun(0, ["-q", "--recursive", source, destination]);
  expect(readFileSync(join(destination, "x/.btrfs-backup.json"), "utf8")).toContain("strangers");
  const [, second = ""] = snapshotNames(destination);
  for (const [name, text] of [
    [FIRST, "x 1"],
    [second, "x anew"],
  ] as const) {
    const target = join(b.path, name);
    await expectRun(0, ["restore", "-q", "--recursive", "--snapshot", name, destination, target]);
    expect([name, it(target, "x")]).toEqual([name, text]);
  }
});

test("nothing half is visible: an occupied place, Ctrl-C and kill -9; the next restore clears up", async () => {
  const { source, destination } = smallTree(["x", "x/y"]);
  const b = filesystem();
  writeFileSync(join(source, "x/y/large"), randomBytes(1 << 20));
  await makeTree({ source, members: ["x", "x/y"], name: FIRST, destinations: [destination] });
  const target = join(b.path, "again");
  const args = ["restore", "--recursive", destination, target];
  const beside = () => readdirSync(b.path).filter((name) => name.startsWith("again"));
  // The subvolume around it has a file in its place by its next run, which it itself lacks.
  sh(`btrfs -q subvolume delete "$1" >/dev/null; echo no >"$1"`, join(source, "x/y"));
  await makeTree({ source, members: ["x"], name: SECOND, destinations: [destination] });
  expect((await expectRun(1, args)).stderr).toContain(
    "x/y: the backup of the subvolume around it has something else in its place",
  );
  expect(beside()).toEqual([]);
  // So it does where a directory on the way to it is a link by then.
  sh(`rm "$1/x/y"; btrfs -q subvolume delete "$1/x" >/dev/null; ln -s /etc "$1/x"`, source);
  await makeTree({
    source,
    members: [],
    name: THIRD,
    destinations: [destination],
    gone: { x: THIRD },
  });
  expect((await expectRun(1, args)).stderr).toContain("is not a plain folder in this backup");
  expect([beside(), existsSync("/etc/y")]).toEqual([[], false]);
  const first = [...args.slice(0, 2), "--snapshot", FIRST, ...args.slice(2)];
  // A member that has a lock of its own is locked as well.
  const lock = join(destination, "x/y/.btrfs-backup..lock");
  sh(`rm "$1"; touch "$1"`, lock);
  const unlock = await holdLock(lock);
  expect((await expectRun(3, first)).stderr).toContain(join(destination, "x/y"));
  expect(beside()).toEqual([]);
  await unlock();
  for (const how of ["SIGINT", "SIGKILL"] as const) {
    const left = beside();
    const running = start([...first, "--rate-limit", "500k"]);
    const isBuilt = (name: string) =>
      !left.includes(name) && existsSync(join(b.path, name, "tree/x/it"));
    await waitFor("the subvolume around the last one", () => beside().some(isBuilt));
    running.child.kill(how);
    await running.finished;
    expect([how, existsSync(target)]).toEqual([how, false]);
    if (how === "SIGINT") expect(beside()).toEqual([]);
  }
  // Killed with a part of the tree built: as NEST leaves it.
  const work = join(b.path, "again.restoring-20260101-000000");
  mkdirSync(work);
  writeFileSync(join(work, ".btrfs-backup.restoring"), "");
  for (const path of ["members", "tree", "tree/x", "tree/x/y"]) subvolume(join(work, path));
  await expectRun(0, first);
  expect([it(target, "x"), it(target, "x/y"), beside()]).toEqual(["x 1", "x/y 1", ["again"]]);
});

test("a plain directory's subvolumes come back below a plain directory, and go on in their snapshot folder", async () => {
  const { source, destination, a } = smallTree(["one", "deep/two"], true);
  const folder = join(a.path, "snapshots");
  const run = {
    source,
    destinations: [destination],
    members: ["one", "deep/two"],
    folder,
    prefix: "c-",
  };
  await makeTree({ ...run, name: `c-${FIRST}` });
  await makeTree({ ...run, name: `c-${SECOND}` });
  for (const place of [folder, destination]) {
    const { stdout } = await expectRun(0, ["list", place]);
    expect([place, /^deep\/two +2 +(\S+)/m.exec(stdout)?.[1]]).toEqual([place, `c-${FIRST}`]);
  }
  sh(`btrfs -q subvolume delete "$1/one" "$1/deep/two" >/dev/null; rmdir "$1/deep" "$1"`, source);
  for (const [place, prune] of [
    [folder, false],
    [destination, true],
  ] as const) {
    if (prune) reformat(a);
    await expectRun(0, ["restore", "--recursive", "-f", folder, place, source]);
    expect([it(source, "one"), it(source, "deep/two")]).toEqual(["one 1", "deep/two 1"]);
    expect(statSync(source).ino).not.toBe(256);
    for (const path of ["one", "deep/two"]) {
      writeFileSync(join(source, path, "new"), "new");
      const args = [
        "--json",
        "-p",
        "c-",
        "-f",
        join(folder, path),
        join(source, path),
        join(destination, path),
      ];
      const next = await expectRun(0, args);
      expect(transfers(next)).toMatchObject([{ parent: expect.any(String) }]);
    }
    if (!prune) deleteTree(source);
    if (!prune) sh(`rmdir "$1/deep" "$1"`, source);
  }
});

test("--replace: the old tree is kept aside, snapshots of all move to the new one, and every destination goes on", async () => {
  const { source, snapshots, destination, destinations, members } = await replaced();
  writeFileSync(join(source, "x/it"), "lost");
  await expectRun(0, ["restore", "-q", "--recursive", "--replace", source, source]);
  for (const path of members) expect(it(source, path)).toBe(`${path} 1`);
  const old = readdirSync(dirname(source)).find((name) => name.startsWith("home.before-")) ?? "";
  expect(it(join(dirname(source), old), "x")).toBe("lost");
  // The one with snapshots of its own keeps them there.
  for (const path of ["", ...members]) {
    const folder = path === "own" ? join(source, "own/snapshot") : join(source, "snapshot", path);
    expect([path, snapshotNames(folder)]).toEqual([path, [FIRST, SECOND]]);
    writeFileSync(join(source, path, "new"), "new");
    const args = ["--json", "-f", folder, join(source, path), join(destinations[0], path)];
    expect([path, transfers(await expectRun(0, args))]).toMatchObject([path, [{ parent: SECOND }]]);
  }
  expect(snapshots).toBe(join(source, "snapshot"));
  // Killed while names change and snapshots move: the next restore goes on with it.
  const names = (path: string) =>
    snapshotNames(path === "own" ? join(source, "own/snapshot") : join(source, "snapshot", path));
  const before = new Map(["", ...members].map((path) => [path, names(path)]));
  const random = seeded();
  for (let i = 0; i < soak(1); i++) {
    await nextSecond();
    const running = start(["restore", "--recursive", "--replace", source, source]);
    const finishing = () =>
      descendants(running.pid).filter(({ text }) => text.includes("btrfs-backup:finish"));
    await waitFor(
      "names to change",
      () => finishing().length > 0 || running.child.exitCode !== null,
    );
    await Bun.sleep(random() * 60);
    for (const { pid } of finishing()) signal(pid);
    await running.finished;
    await nextSecond();
    await expectRun(0, ["restore", "-q", "--recursive", "--replace", source, source]);
    for (const [path, all] of before) expect([i, path, names(path)]).toEqual([i, path, all]);
  }
  // From the backups, in the same way.
  await expectRun(0, ["restore", "-q", "--recursive", "--replace", destination, source]);
  for (const path of members) expect(it(source, path)).toBe(`${path} 1`);
});

async function replaced() {
  const members = ["own", "x", "x/y"];
  const { source, destination } = smallTree(members);
  mkdirSync(join(source, "own/snapshot"));
  const destinations = [destination] as const;
  await makeTree({ source, members, name: FIRST, destinations });
  await makeTree({ source, members, name: SECOND, destinations });
  return { source, destination, destinations, members, snapshots: join(source, "snapshot") };
}

test("list, verify, prune and versions know a tree", async () => {
  const { source, destination } = smallTree(["x", "y", "x/z"]);
  const store = `raw://${temporaryDirectory()}/s`;
  const run = { source, destinations: [destination, store] };
  await makeTree({ ...run, members: ["x", "y", "x/z"], name: FIRST });
  writeFileSync(join(source, "x/z/it"), "x/z 2");
  sh(`btrfs -q subvolume delete "$1" >/dev/null`, join(source, "y"));
  await makeTree({ ...run, members: ["x", "x/z"], name: SECOND, gone: { y: SECOND } });

  const listed = await expectRun(0, ["list", source, destination]);
  const rows = listed.stdout.split("\n").map((line) => line.replace(/ +/g, " ").trim());
  expect(rows).toContain(`B below ${destination}`);
  expect(rows.find((row) => row.startsWith(`x/z 2 ${FIRST} ${SECOND} `))).toBeDefined();
  expect(rows.find((row) => row.startsWith(`y 1 ${FIRST} ${FIRST} `))).toEndWith(
    `gone since ${SECOND}`,
  );
  const trees = events(
    await expectRun(0, ["list", "--json", "--recursive", destination, store]),
  ).filter(({ event }) => event === "tree");
  expect(trees).toMatchObject([
    {
      location: destination,
      members: [
        { path: "x", snapshots: [FIRST, SECOND] },
        { path: "x/z", count: 2, gone: null },
        { path: "y", newest: FIRST, gone: SECOND },
      ],
    },
    {
      location: store,
      members: [{ path: "x", count: 2 }, { path: "x/z" }, { path: "y", count: 1 }],
    },
  ]);
  // What rclone reaches, and a key that may only read, find the same.
  const directory = store.slice("raw://".length);
  const { guarded, url } = await sshServer();
  const overSsh = `raw+${url(directory)}`;
  for (const place of [`rclone://:local:${directory}`, overSsh]) {
    const key = guarded("--path", directory, "--allow-read");
    const told = await expectRun(0, ["list", "--json", "--recursive", ...key, place]);
    const tree = events(told).find(({ event }) => event === "tree");
    expect(tree?.["members"]).toMatchObject([
      { path: "x", count: 2 },
      { path: "x/z" },
      { path: "y" },
    ]);
    if (place === overSsh) continue;
    const again = join(dirname(source), "again");
    await expectRun(0, ["restore", "-q", "--recursive", "--snapshot", FIRST, ...key, place, again]);
    expect([it(again, "x/z"), it(again, "y")]).toEqual(["x/z 1", "y 1"]);
    deleteTree(again);
  }

  const aged = await expectRun(1, ["list", "--max-age", "1d", destination]);
  expect(
    aged.stdout
      .split("\n")
      .filter(Boolean)
      .map((line) => line.split(": ").slice(0, 2)),
  ).toEqual([
    ["TOO OLD", destination],
    ["TOO OLD", `${destination}/x`],
    ["TOO OLD", `${destination}/x/z`],
  ]);

  const verified = await expectRun(0, [
    "verify",
    "--json",
    "--recursive",
    "--all",
    source,
    destination,
    store,
  ]);
  expect(events(verified).at(-1)).toMatchObject({ event: "summary", compared: 14 });
  damage(join(destination, "x/z", SECOND), "echo bad >it");
  const bad = await expectRun(1, ["verify", "--recursive", source, destination]);
  expect(bad.stderr).toContain(`${destination}/x/z: ${SECOND} differs`);

  // A file in a nested subvolume, also in one that went; wherever the tree's backups are named.
  const file = join(source, "x/z/it");
  for (const places of [[], [destination]]) {
    const found = await expectRun(0, ["versions", "--json", file, ...places]);
    const states = events(found).filter(({ event }) => event === "version");
    expect(states.map(({ first, locations }) => [first, locations])).toEqual([
      [SECOND, [file.slice(0, -3), `${destination}/x/z`]],
      [FIRST, [file.slice(0, -3), `${destination}/x/z`]],
    ]);
  }
  expect((await expectRun(0, ["versions", file])).stdout).toContain("(as it is now)");
  await expectRun(0, ["versions", "-q", "--get", FIRST, file]);
  expect(readFileSync(`${file}.${FIRST}`, "utf8")).toBe("x/z 1");
  const lost = await expectRun(0, ["versions", "--json", join(source, "y/it")]);
  expect(events(lost)[0]).toMatchObject({
    event: "version",
    first: FIRST,
    locations: [join(source, "y"), `${destination}/y`],
  });

  for (const place of [destination, store])
    await expectRun(0, ["prune", "-q", "--recursive", "-n", "1", place]);
  for (const [path, names] of [
    ["", [SECOND]],
    ["x", [SECOND]],
    ["x/z", [SECOND]],
    ["y", [FIRST]],
  ] as const)
    expect([path, snapshotNames(join(destination, path))]).toEqual([path, [...names]]);
});
