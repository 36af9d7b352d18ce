// A source with subvolumes below it comes back whole, as of one moment, from wherever its backups
// are, and whoever looks at the backups sees which belong together.

import { expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { basename, dirname, join } from "node:path";
import {
  change,
  events,
  expectRun,
  fill,
  filesystem,
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
import { generator } from "./support/random.ts";
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

/** A tree with three runs: one of its subvolumes goes before the second, another comes. */
async function threeRuns(to: (destination: string) => readonly string[]) {
  const { source, destination, a, b } = pair();
  const always = ["top", "var/lib/a", DEEP];
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
  await go(THIRD, [...always, "made/later/new"], { "var/old": SECOND });
  return { source, destination, a, b, states, always };
}

test("the whole disaster: a tree comes back as of its newest run, and each subvolume's next backup is incremental", async () => {
  const store = `raw://${temporaryDirectory()}/store`;
  const { source, destination, a, states } = await threeRuns((place) => [place, store]);
  const members = [...(states.get(THIRD)?.keys() ?? [])].filter(Boolean);
  const { options, url } = await sshServer();
  // Beside the source, from its own snapshots; from each kind of place to another filesystem.
  const other = filesystem();
  for (const [i, place] of [destination, url(destination), store, source].entries()) {
    const target = join(i === 3 ? a.path : other.path, `again${i}`);
    await expectRun(0, ["restore", "-q", "--recursive", ...options, place, target]);
    expectTree(target, states.get(THIRD) as Map<string, string>);
    sh(
      `btrfs -q subvolume delete $(btrfs subvolume list -o "$1" >/dev/null; echo) "$1" 2>/dev/null || true`,
      target,
    );
  }
  reformat(a);
  await expectRun(0, ["restore", "-q", "--recursive", destination, source]);
  expectTree(source, states.get(THIRD) as Map<string, string>);
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
    expect([path, transfers(next)]).toMatchObject([path, [{ parent: THIRD }]]);
  }
  const record = readFileSync(join(source, "snapshot/.btrfs-backup.json"), "utf8");
  expect(record).toContain(`"tree":{"gone":{"var/old":"${SECOND}"}}`);
});
