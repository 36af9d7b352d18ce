// What a machine runs out of costs what needs it, is told in one line, and leaves no process behind.

import { describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { descendants, signal } from "./support/processes.ts";
import {
  contentsDigest,
  expectRun,
  expectSound,
  filesystem,
  nextSecond,
  pair,
  run,
  sh,
  snapshotAs,
  snapshotNames,
  start,
  subvolume,
  temporaryDirectory,
  waitFor,
} from "./support/rig.ts";

/** Whether any process has a place in its command line. */
function isServed(place: string): boolean {
  const text = (pid: string) => {
    try {
      return readFileSync(`/proc/${pid}/cmdline`, "utf8");
    } catch {
      return ""; // it has ended
    }
  };
  return readdirSync("/proc").some((name) => /^\d+$/.test(name) && text(name).includes(place));
}

describe("too few descriptors", () => {
  test.each([
    [20, 1],
    [20, 4],
    [24, 4],
    [28, 4],
    [32, 4],
    [36, 4],
  ])(
    "of %d, for %d destinations: a line each, and the next run does the rest",
    async (most, count) => {
      const source = subvolume(join(filesystem().path, "home"));
      sh(`head -c 3M /dev/urandom >"$1/file"`, source);
      const places = Array.from({ length: count }, () => join(filesystem().path, "backup"));
      const { status, stderr } = await run([source, ...places], {
        wrapper: ["bash", "-c", `ulimit -n ${most}; exec "$@"`, "sh"],
      });
      if (status !== 0)
        expect(stderr).toMatch(
          /no process can be started: see ulimit -n|too many files are open: see ulimit -n/,
        );
      expect([status === 0 || status === 1, /\n {4}at |Error: /.test(stderr)]).toEqual([
        true,
        false,
      ]);
      await waitFor("all to be gone", () => !places.some(isServed));
      await nextSecond();
      await expectRun(0, [source, ...places]);
      for (const place of places) expectSound(place, join(source, "snapshot"));
    },
  );
});

describe("the directory for what runs need", () => {
  const around = (script: string) => ["unshare", "-m", "sh", "-c", `${script}; "$@"`, "sh"];
  /** Beside it: two destinations, for which pipes are made. */
  const two = () => {
    const source = subvolume(join(filesystem().path, "home"));
    return { source, places: [1, 2].map(() => join(filesystem().path, "backup")) };
  };

  test.each([
    ["is full", "mount -t tmpfs -o size=16k tmpfs /run; head -c 16k /dev/zero >/run/full || :"],
    ["has no inode left", "mount -t tmpfs -o nr_inodes=1 tmpfs /run"],
    ["is read-only", "mount -t tmpfs -o ro tmpfs /run"],
  ])("%s: /tmp serves", async (_, script) => {
    const { source, places } = two();
    await expectRun(0, [source, ...places], { wrapper: around(script) });
    for (const place of places) expectSound(place, join(source, "snapshot"));
  });

  test("is nowhere: one line says so", async () => {
    const { source, places } = two();
    const { stderr } = await expectRun(1, [source, ...places], {
      env: { TMPDIR: "" },
      wrapper: around(
        "for d in /run /tmp; do mount --bind $d $d; mount -o remount,bind,ro $d; done",
      ),
    });
    expect(stderr).toContain("cannot write to a private directory in /run or /tmp: are they full?");
    expect(stderr).not.toMatch(/\n {4}at /);
  });

  test("of a run that was killed goes with the next one; that of one at work stays", async () => {
    const { source, places } = two();
    const runtime = temporaryDirectory();
    const wrapper = around(`mount --bind ${runtime} /run`);
    const dirs = () => readdirSync(runtime).filter((name) => /^btrfs-backup\.\d/.test(name)).length;
    sh(`head -c 8M /dev/urandom >"$1/file"`, source);
    const begin = () =>
      start(["--protocol", "1", "--rate-limit", "1m", source, ...places], { wrapper });
    const first = begin();
    await waitFor(
      "it to be at work",
      () =>
        dirs() === 1 &&
        places.every((place) => existsSync(place) && snapshotNames(place).length === 1),
    );
    for (const { pid } of descendants(first.pid)) signal(pid);
    signal(first.pid);
    await first.finished;
    expect(dirs()).toBe(1);
    await nextSecond();
    const second = begin();
    await waitFor(
      "its own",
      () =>
        dirs() === 1 && descendants(second.pid).some(({ text }) => text.startsWith("btrfs send")),
    );
    const other = subvolume(join(filesystem().path, "other"));
    await expectRun(0, [other], { wrapper });
    expect(dirs()).toBe(1);
    for (const { pid } of descendants(second.pid)) signal(pid);
    signal(second.pid);
    await second.finished;
    await expectRun(0, ["--wait", "20", source, ...places], { wrapper });
    expect(dirs()).toBe(0);
    for (const place of places) expectSound(place, join(source, "snapshot"));
  });
});

test("several restores in one second each get a name of their own", async () => {
  const { source, a } = pair();
  writeFileSync(join(source, "state"), "right");
  snapshotAs(source, "20260101-000000");
  const folder = join(a.path, "restored");
  mkdirSync(folder);
  for (let i = 0; i < 3; i++)
    await expectRun(0, [
      "restore",
      "--replace",
      "--snapshot",
      "20260101-000000",
      source,
      join(folder, "home"),
    ]);
  // One that meets the other at work may as well say so, and be repeated.
  const args = [
    "restore",
    "--replace",
    "--wait",
    "20",
    "--snapshot",
    "20260101-000000",
    source,
    join(folder, "home"),
  ];
  const both = await Promise.all([1, 2].map(() => run(args)));
  expect(both.some(({ status }) => status === 0)).toBe(true);
  for (const { status, stderr } of both.filter((one) => one.status !== 0)) {
    expect([status, stderr]).toEqual([3, expect.stringContaining("another restore is at work")]);
    await expectRun(0, args);
  }
  const all = readdirSync(folder).sort();
  expect([all.length, all.every((name) => /^home(\.before-\d{8}-\d{6})?$/.test(name))]).toEqual([
    5,
    true,
  ]);
  for (const name of all) expect(contentsDigest(join(folder, name))).toBe(contentsDigest(source));
});

test("a restore that cannot make its directory says why, and ends", async () => {
  const { source, a } = pair();
  snapshotAs(source, "20260101-000000");
  const folder = join(a.path, "restored");
  mkdirSync(folder);
  sh(`chattr +i "$1"`, folder);
  try {
    const { stderr } = await expectRun(1, [
      "restore",
      "--snapshot",
      "20260101-000000",
      source,
      join(folder, "home"),
    ]);
    expect(stderr).toMatch(
      /cannot create directory.*(Operation not permitted|Read-only file system)/,
    );
  } finally {
    sh(`chattr -i "$1"`, folder);
  }
});
