// setup: what it proposes, that it writes nothing unless it is told to, and that its file is read as it is meant.

import { expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync } from "node:fs";
import { join } from "node:path";
import { setupName, stamp } from "../btrfs-backup.ts";
import {
  events,
  expectRun,
  expectSameTree,
  filesystem,
  fill,
  nextSecond,
  pair,
  pathWith,
  ROOT,
  run,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  subvolume,
  temporaryDirectory,
} from "./support/rig.ts";

/** Everything in a tree, with what changes when anything in it is written. */
const stateOf = (path: string) => sh(`cd "$1"; find . -printf '%p %T@ %C@\\n' | sort`, path);

test("alone, it lists the mounted filesystems with their free space, and the subvolumes that are mounted", async () => {
  const { a, b, source } = pair();
  const mounted = temporaryDirectory();
  sh(`mount --bind "$1" "$2"`, source, mounted);
  try {
    const { stdout, stderr } = await expectRun(0, ["setup"]);
    expect(stderr).toBe("");
    for (const { path } of [a, b]) {
      const size = sh(`findmnt -bno SIZE "$1"`, path);
      expect(size).toBe(String(2 ** 30));
      expect(stdout).toMatch(new RegExp(`^  ${path} +/dev/loop\\d+ +\\S+ of 1\\.0G free$`, "m"));
    }
    expect(stdout).toMatch(new RegExp(`^  ${mounted} +/dev/loop`, "m"));
    expect(stdout).toContain("  btrfs-backup setup ");
    const told = events(await expectRun(0, ["setup", "--json"]));
    const free = Number(sh(`stat -f -c '%a' "$1"`, b.path)) * 4096;
    const one = told.find(({ event, path }) => event === "filesystem" && path === b.path);
    expect([one?.["size"], Math.abs(one?.["free"] - free) < 2 ** 27]).toEqual([2 ** 30, true]);
    expect(told.some(({ event, path }) => event === "subvolume" && path === mounted)).toBe(true);
  } finally {
    sh(`umount "$1"`, mounted);
  }
});

test("a proposal writes nothing anywhere", async () => {
  const { a, b, source, destination } = pair();
  const directory = join(temporaryDirectory(), "etc");
  const before = [a, b].map(({ path }) => stateOf(path));
  const { stdout } = await expectRun(0, ["setup", "--config-dir", directory, source, destination]);
  expect(stdout).toContain(`  ${source}\n`);
  expect(stdout).toContain(`  --optional ${destination}\n`);
  expect(stdout).toContain("btrfs-backup setup --yes --config-dir");
  expect([a, b].map(({ path }) => stateOf(path))).toEqual(before);
  expect(existsSync(directory)).toBe(false);
});

test("with --yes the file is there, a run takes it as it is, a first backup is there, and a second --yes refuses", async () => {
  const { source, snapshots, destination } = pair();
  const directory = join(temporaryDirectory(), "new/etc");
  const words = ["setup", "--yes", "--config-dir", directory, source, destination];
  await expectRun(0, words);
  const [name = "", ...others] = readdirSync(directory);
  expect([name.endsWith("-home.args"), others]).toEqual([true, []]);
  const file = join(directory, name);
  expect(statSync(file).mode & 0o7777).toBe(0o600);
  const [first = ""] = snapshotNames(destination);
  expect(snapshotNames(snapshots)).toEqual([first]);
  expectSameTree(join(snapshots, first), join(destination, first));
  const written = readFileSync(file, "utf8");
  const { status, stderr } = await run(words);
  expect([status, stderr]).toEqual([
    1,
    expect.stringContaining(`${file} exists, and stays as it is`),
  ]);
  expect(readFileSync(file, "utf8")).toBe(written);
  expect(readdirSync(directory)).toEqual([name]);
  expect(snapshotNames(snapshots)).toEqual([first]);
  await nextSecond();
  await expectRun(0, [`@${file}`]);
  expect(snapshotNames(destination).length).toBe(2);
});

test("what is refused by a run is refused in the same words, and nothing is written", async () => {
  const { a, source, snapshots, destination } = pair();
  mkdirSync(join(a.path, "plain"));
  const directory = join(temporaryDirectory(), "etc");
  const wrong: [number, string, string][] = [
    [2, join(a.path, "plain"), destination],
    [2, join(a.path, "none"), destination],
    [2, source, join(source, "snapshot/x")],
    [1, source, join(a.path, "backup")],
    [1, source, join(temporaryDirectory(), "none/none/backup")],
    [2, source, "s3://bucket/x"],
  ];
  for (const [status, from, to] of wrong) {
    const plain = await run(["--dry-run", "--quiet", from, to]);
    const set = await run(["setup", "--yes", "--config-dir", directory, from, to]);
    expect([from, to, set.status, plain.status]).toEqual([from, to, status, status]);
    expect(set.stderr).toStartWith(plain.stderr.trimEnd());
    if (status === 1) expect(set.stderr).toContain("nothing was written");
  }
  for (const words of [["--yes"], [source], ["--config-dir", directory]])
    expect((await run(["setup", ...words])).status).toBe(2);
  expect([existsSync(directory), existsSync(snapshots), existsSync(destination)]).toEqual([
    false,
    false,
    false,
  ]);
});

const ODD = [
  " blanks within and around ",
  `quotes'"\`$(x);\\`,
  "-dash",
  "@at",
  "#number",
  "--optional x",
  "ü ☃",
  "100%",
];
for (const odd of ODD)
  test(`${JSON.stringify(odd)} as a name of SOURCE and DEST survives the way through the file`, async () => {
    const [a, b] = [filesystem(), filesystem()];
    const source = subvolume(join(a.path, odd));
    fill(source);
    const directory = join(temporaryDirectory(), odd);
    const words = ["setup", "--yes", "--config-dir", directory, `./${odd}`, join(b.path, odd)];
    const installed = { env: pathWith(join(ROOT, "dist")) };
    const { stderr } = await expectRun(0, words, { cwd: a.path, ...installed });
    const [file = ""] = readdirSync(directory);
    await nextSecond();
    await expectRun(0, [`@${directory}/${file}`]);
    // The line for cron, as crontab(5) has it read.
    const [, line = ""] = /into \/etc\/crontab: (?:\S+ ){5}root (.*)$/m.exec(stderr) ?? [];
    await nextSecond();
    const [first, second] = snapshotNames(join(source, "snapshot"));
    expect(sh(`sh -c "$1" 2>&1`, line.replaceAll("\\%", "%"))).toBe("");
    // The day's first one, and the newest.
    const names = snapshotNames(join(source, "snapshot"));
    expect([names[0], names.length > 1, names.at(-1) === second]).toEqual([first, true, false]);
    expect(snapshotNames(join(b.path, odd))).toEqual(names);
    expect(readdirSync(b.path)).toEqual([odd]);
  });

test("a name that no line can hold is refused before anything is written", async () => {
  const { a, b } = pair();
  const source = subvolume(join(a.path, "line\nbreak"));
  const directory = join(temporaryDirectory(), "etc");
  const words = ["setup", "--yes", "--config-dir", directory];
  for (const [from, to] of [
    [source, join(b.path, "x")],
    [join(a.path, "home"), join(b.path, "line\nbreak")],
    [join(a.path, "home"), `${b.path}/a\u2028b`],
  ] as const) {
    const { status, stderr } = await run([...words, from, to]);
    expect([status, stderr]).toEqual([2, expect.stringContaining("cannot hold")]);
  }
  expect([existsSync(directory), readdirSync(b.path)]).toEqual([false, []]);
});

test("options of the command line that runs need are in the file, and places on other hosts, too", async () => {
  const ssh = await sshServer();
  const { source, destination } = pair();
  const directory = join(temporaryDirectory(), "etc");
  const words = ["setup", "--yes", "--config-dir", directory, ...ssh.options, "-p", "my home-"];
  await expectRun(0, [...words, ssh.url(source), ssh.url(destination)]);
  expect(snapshotNames(destination, "my home-").length).toBe(1);
  const [file = ""] = readdirSync(directory);
  await nextSecond();
  await expectRun(0, [`@${directory}/${file}`]);
  expect(snapshotNames(destination, "my home-").length).toBe(2);
});

test("the first run's exit status is that of setup, and its file stays", async () => {
  const { source, destination } = pair();
  const directory = join(temporaryDirectory(), "etc");
  const words = ["setup", "--yes", "--config-dir", directory, source, destination];
  const { status, stderr } = await run([...words, "shell://cat >/dev/null; exit 3"]);
  expect([status, stderr]).toEqual([1, expect.stringContaining("shell://cat")]);
  expect(readdirSync(directory).length).toBe(1);
  expect(snapshotNames(destination).length).toBe(1);
});

test("a directory that others can change holds no arguments of root's", async () => {
  const { source, snapshots, destination } = pair();
  const directory = temporaryDirectory();
  sh(`chmod 777 "$1"`, directory);
  for (const where of [directory, join(directory, "etc")]) {
    const words = ["setup", "--yes", "--config-dir", where, source, destination];
    const { status, stderr } = await run(words);
    expect([status, stderr]).toEqual([
      1,
      expect.stringContaining(`others can change ${directory}, and so what root runs`),
    ]);
  }
  expect([readdirSync(directory), existsSync(snapshots)]).toEqual([[], false]);
});

test("what stood there before setup is not deleted: then retention is left to the user", async () => {
  const { source, snapshots, destination } = pair();
  for (const days of [9, 8, 7, 6, 5, 4, 3, 2, 1])
    snapshotAs(source, stamp(new Date(Date.now() - days * 86_400e3)));
  await expectRun(0, [source, destination]);
  const before = snapshotNames(destination);
  expect(before.length).toBe(10);
  const directory = join(temporaryDirectory(), "etc");
  await nextSecond();
  await expectRun(0, ["setup", "--yes", "--config-dir", directory, source, destination]);
  for (const folder of [snapshots, destination])
    expect(snapshotNames(folder)).toEqual([...before, expect.any(String) as never]);
  const [file = ""] = readdirSync(directory);
  const written = readFileSync(join(directory, file), "utf8");
  expect(written).toMatch(/^# Snapshots .* if that is meant: -N 7d$/m);
  expect(written).not.toMatch(/^-[Nn]/m);
});

/**
 * A machine of its own to boot from: /etc, /run and /var/lib/prometheus are copies, systemd seems to run there, and what
 * systemctl gets is written down. There is no systemd in a namespace of tests.
 */
const MACHINE = `set -e
  state=$1; units=$2; shift 2
  if [ ! -d "$state/etc" ]; then cp -a /etc "$state/etc"; mkdir -p "$state/run/systemd/system" "$state/bin"; fi
  mount --bind "$state/etc" /etc; mount --bind "$state/run" /run
  if [ "$units" = units ]; then mkdir -p /etc/systemd/system; cp scripts/btrfs-backup@.* /etc/systemd/system; fi
  if [ "$units" = all ]; then mkdir -p /etc/systemd/system; cp scripts/btrfs-backup*.service scripts/btrfs-backup*.timer /etc/systemd/system; fi
  printf '#!/bin/sh\\necho "$*" >>%s/systemctl\\n' "$state" >"$state/bin/systemctl"; chmod 755 "$state/bin/systemctl"
  PATH=$state/bin:$PATH exec "$@"`;

test("where systemd runs, --yes writes to /etc/btrfs-backup and enables the timer; without unit files nothing is written", async () => {
  const { a, b, source, destination } = pair();
  const state = temporaryDirectory();
  const on = (units: string) => ({
    wrapper: ["unshare", "-m", "bash", "-c", MACHINE, "bash", state, units],
  });
  const refused = await run(["setup", "--yes", source, destination], on(""));
  expect([refused.status, refused.stderr]).toEqual([
    1,
    expect.stringContaining("copy both to /etc/systemd/system"),
  ]);
  expect([existsSync(join(state, "etc/btrfs-backup")), readdirSync(a.path)]).toEqual([
    false,
    ["home"],
  ]);
  expect(snapshotNames(source)).toEqual([]);
  sh(`echo "UUID=$2 $3 btrfs noatime 0 0" >>"$1/etc/fstab"`, state, b.uuid, b.path);
  await expectRun(0, ["setup", "--yes", source, destination], on("units"));
  const [file = ""] = readdirSync(join(state, "etc/btrfs-backup"));
  const name = file.replace(/\.args$/, "");
  // A disk that /etc/fstab mounts is not --optional.
  const written = readFileSync(join(state, "etc/btrfs-backup", file), "utf8");
  expect(written).toContain(`\n${destination}\n`);
  expect(written).not.toContain("--optional");
  expect(name).toBe(source.slice(1).replaceAll("/", "-"));
  expect(readFileSync(join(state, "systemctl"), "utf8")).toBe(
    `enable --now -- btrfs-backup@${name}.timer\n`,
  );
  expect(snapshotNames(destination).length).toBe(1);
  expect(existsSync(join("/etc/btrfs-backup", file))).toBe(false);
});

test("the one timer for all is enabled where there is no other file, or it is at work; else a file gets its own", async () => {
  const { a, b, source, destination } = pair();
  const state = temporaryDirectory();
  const on = { wrapper: ["unshare", "-m", "bash", "-c", MACHINE, "bash", state, "all"] };
  const enabled = () => {
    const told = readFileSync(join(state, "systemctl"), "utf8");
    sh(`rm "$1/systemctl"`, state);
    return told;
  };
  await expectRun(0, ["setup", "--yes", source, destination], on);
  expect(enabled()).toBe("enable --now -- btrfs-backup.timer\n");
  const [other, third] = ["other", "third"].map((name) => subvolume(join(a.path, name)));
  const name = setupName({ host: null, path: other as string });
  // The file that is there may have a timer of its own.
  await expectRun(0, ["setup", "--yes", other as string, join(b.path, "other")], on);
  expect(enabled()).toBe(`enable --now -- btrfs-backup@${name}.timer\n`);
  const wants = "/etc/systemd/system/timers.target.wants";
  sh(`mkdir -p "$1$2"; ln -s ../btrfs-backup.timer "$1$2"`, state, wants);
  await expectRun(0, ["setup", "--yes", third as string, join(b.path, "third")], on);
  expect(enabled()).toBe("enable --now -- btrfs-backup.timer\n");
  // What was set up is what the timer's service runs.
  const { stderr } = await expectRun(0, ["all", "--dry-run"], on);
  for (const one of [source, other, third]) expect(stderr).toContain(`of ${one}\n`);
  expect((await expectRun(0, ["list"], on)).stdout).toContain(destination);
});
