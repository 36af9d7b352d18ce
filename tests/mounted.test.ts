// A subvolume that is mounted itself, as distributions mount / and /home, is replaced where it is, and what everybody sees is the
// old one until it is mounted anew.

import { expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { generator } from "./support/random.ts";
import {
  change,
  contentsDigest,
  events,
  expectRun,
  expectSound,
  fill,
  filesystem,
  nextSecond,
  pathWith,
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

type Layout = {
  readonly subvolumes: readonly string[];
  /** The default subvolume. */
  readonly standard?: string;
  /** What is mounted, with the options of its mount. */
  readonly mounts: readonly (readonly [subvolume: string, options: string])[];
};
const LAYOUTS = {
  fedora: {
    subvolumes: ["root", "home"],
    mounts: [
      ["root", "subvol=root"],
      ["home", "subvol=home"],
    ],
  },
  ubuntu: {
    subvolumes: ["@", "@home"],
    mounts: [
      ["@", "subvol=@"],
      ["@home", "subvol=/@home"],
    ],
  },
  openSUSE: {
    subvolumes: ["@", "@/home", "@/.snapshots", "@/.snapshots/1/snapshot"],
    standard: "@/.snapshots/1/snapshot",
    mounts: [
      ["@/.snapshots/1/snapshot", "defaults"],
      ["@/home", "subvol=/@/home"],
    ],
  },
} satisfies Record<string, Layout>;

/** A filesystem with the layout of a distribution: its device, and how its subvolumes are mounted anew. */
function installed({ subvolumes: all, mounts, standard }: Layout) {
  const { path } = filesystem();
  const device = sh(`findmnt -no SOURCE "$1"`, path);
  for (const one of all) {
    mkdirSync(dirname(join(path, one)), { recursive: true });
    subvolume(join(path, one));
  }
  if (standard !== undefined) sh(`btrfs subvolume set-default "$1"`, join(path, standard));
  const places = mounts.map(([name, options]) => {
    const at = temporaryDirectory();
    const mount = () => sh(`mount -t btrfs -o "$1" "$2" "$3"`, options, device, at);
    mount();
    fill(at);
    const remount = () => {
      sh(`umount "$1"`, at);
      mount();
    };
    return { name, at, remount, line: `${device} ${at} btrfs ${options} 0 0` };
  });
  sh(`umount "$1"`, path);
  /** Looks at the top level, as nobody does in daily life. */
  const onTop = <T>(look: (top: string) => T): T => {
    sh(`mount -t btrfs -o subvolid=5 "$1" "$2"`, device, path);
    try {
      return look(path);
    } finally {
      sh(`umount "$1"`, path);
    }
  };
  const end = () => sh(`for at; do umount -l "$at"; done`, ...places.map(({ at }) => at));
  return { device, places, onTop, end };
}

/** The program sees this /etc/fstab. */
function withFstab(text: string) {
  const file = join(temporaryDirectory(), "fstab");
  writeFileSync(file, text);
  const script = `mount --bind "$1" /etc/fstab; shift; exec "$@"`;
  return { wrapper: ["unshare", "-m", "bash", "-c", script, "bash", file] };
}

/** What is mounted of a device, for everybody. */
const mountTable = (device: string) =>
  readFileSync("/proc/self/mountinfo", "utf8")
    .split("\n")
    .filter((line) => line.includes(` ${device} `))
    .join("\n");
const lastLine = (stderr: string) => stderr.trimEnd().split("\n").at(-1);
/** The UUIDs that the data in a folder go by: received snapshots move as copies. */
const uuids = (folder: string) =>
  [...subvolumes(folder)].map(([name, { uuid, receivedUuid }]) => [name, receivedUuid ?? uuid]);

/** Two backups of a mounted subvolume, and what it held at the second. */
async function backedUp(args: readonly string[], at: string): Promise<string> {
  await expectRun(0, [...args]);
  change(at, generator(3));
  await nextSecond();
  await expectRun(0, [...args]);
  const state = contentsDigest(at);
  change(at, generator(4));
  writeFileSync(join(at, "lost"), "x");
  return state;
}

/** The next run from a restored subvolume sends a difference. */
async function expectIncremental(args: readonly string[]): Promise<void> {
  const [sent] = transfers(await expectRun(0, ["--json", ...args]));
  expect(sent).toMatchObject({ parent: expect.stringMatching(/^\d{8}-\d{6}$/) });
}

const CASES = [
  ["fedora", 1, "line"],
  ["ubuntu", 0, "none"],
  ["openSUSE", 0, "line"],
  ["openSUSE", 1, "subvolid"],
] as const;

async function expectReplaced([layout, index, fstab]: (typeof CASES)[number]): Promise<void> {
  const machine = installed(LAYOUTS[layout]);
  const { name, at, remount, line } = machine.places[index] as (typeof machine.places)[0];
  const destination = join(filesystem().path, "backup");
  const state = await backedUp([at, destination], at);
  const old = sh(`btrfs inspect-internal rootid "$1"`, at);
  const text = {
    line,
    none: "# nothing",
    subvolid: `${line.replace(/subvol=\S+/, `subvolid=${old}`)}`,
  };
  const on = withFstab(`# a comment\n${text[fstab]}\n`);
  const seen = mountTable(machine.device);
  const byHand = fstab === "none" ? `mount -o 'subvol=${name}' '${machine.device}'` : "mount";
  const command = `umount '${at}' && ${byHand} '${at}'`;

  const { stderr } = await expectRun(1, ["restore", destination, at]);
  expect(stderr).toContain(
    `is a mount point, of the subvolume ${name} of ${machine.device}; --replace`,
  );
  const dry = await expectRun(0, ["restore", "--dry-run", "--replace", destination, at], on);
  expect(dry.stderr).toContain("Nothing was changed");
  const restored = await expectRun(0, ["restore", "--json", "--replace", destination, at], on);
  const told = events(restored);
  const before = told.find(({ event }) => event === "restore")?.["before"] as string;
  expect(told.find(({ event }) => event === "restore")).toMatchObject({
    target: at,
    before: expect.stringMatching(new RegExp(`^/${name}\\.before-\\d{8}-\\d{6}$`)),
    remount: command,
  });
  expect(lastLine(restored.stderr)).toEndWith(command);
  expect(restored.stderr).toContain(`btrfs subvolume delete '/mnt${before}`);
  expect(told.filter(({ event }) => event === "warning").map(({ message }) => message)).toEqual([
    // The snapshots of the lost one stay with it.
    expect.stringContaining(`below the old ${at}`),
    ...(fstab === "subvolid"
      ? [
          `/etc/fstab has subvolid=${old} for ${at}, which is the old one: write subvol=${name} in its place`,
        ]
      : []),
  ]);
  expect(mountTable(machine.device).replaceAll(before, `/${name}`)).toBe(seen);
  expect(existsSync(join(at, "lost"))).toBe(true);
  const refused = await expectRun(1, [at, destination]);
  expect(refused.stderr).toContain("is still mounted there: umount");

  remount();
  expect(sh(`findmnt -no FSROOT "$1"`, at)).toBe(`/${name}`);
  expect([contentsDigest(at), existsSync(join(at, "lost"))]).toEqual([state, false]);
  machine.onTop((top) => {
    expect(existsSync(join(top, before, "lost"))).toBe(true);
    expect(sh(`find "$1" -name "*.restoring-*"`, top)).toBe("");
  });
  await nextSecond();
  await expectIncremental([at, destination]);

  // From its own snapshots, which move along.
  await nextSecond();
  const [snapshots, now] = [join(at, "snapshot"), contentsDigest(at)];
  const had = uuids(snapshots);
  writeFileSync(join(at, "lost"), "again");
  await expectRun(0, ["restore", "--replace", at, at], on);
  expect(snapshotNames(snapshots)).toEqual([]);
  remount();
  expect([contentsDigest(at), existsSync(join(at, "lost"))]).toEqual([now, false]);
  expect(uuids(snapshots)).toEqual(had);
  await expectIncremental([at, destination]);
  expectSound(destination, snapshots);
  machine.end();
}

test("on each layout: replaced, mounted anew, and the next run is incremental", async () => {
  await Promise.all(CASES.map(expectReplaced));
}, 120_000);

/** What kills the program, and the shell that moves snapshots, when the second one is moved. */
const KILLING = `#!/bin/sh
case $* in
  */snapshot/2*)
    if [ -e "$STATE/first" ] && [ ! -e "$STATE/killed" ]; then touch "$STATE/killed"; kill -9 "$(cat "$STATE/pid")" "$PPID"; exit 1; fi
    touch "$STATE/first"
    ;;
esac
exec /usr/bin/mv "$@"`;

test("kill -9 while the snapshots move: nothing stays behind, and the next run finishes it, mounted anew or not", async () => {
  for (const remountsFirst of [true, false]) {
    const machine = installed(LAYOUTS.ubuntu);
    const { at, remount } = machine.places[1] as (typeof machine.places)[0];
    const destination = join(filesystem().path, "backup");
    const state = await backedUp([at, destination], at);
    const snapshots = join(at, "snapshot");
    const had = uuids(snapshots);
    const [tools, STATE] = [temporaryDirectory(), temporaryDirectory()];
    writeFileSync(join(tools, "mv"), KILLING, { mode: 0o755 });
    const seen = mountTable(machine.device);
    const env = { ...pathWith(tools), STATE };
    const running = start(["restore", "--replace", at, at], { env });
    writeFileSync(join(STATE, "pid"), String(running.pid));
    expect(await running.finished).toMatchObject({ signal: "SIGKILL" });
    expect(mountTable(machine.device).replace(/@home\.before-\d{8}-\d{6}/g, "@home")).toBe(seen);
    const holders = () => sh(`grep -lszxF btrfs-backup:top /proc/[0-9]*/cmdline || :`);
    await waitFor("the mount namespace is gone", () => holders() === "");
    machine.onTop((top) => {
      const [left = "", ...more] = readdirSync(top).filter((name) => name.includes(".restoring-"));
      expect([existsSync(join(top, left, ".btrfs-backup.finishing")), more]).toEqual([true, []]);
    });
    if (remountsFirst) remount();
    const next = await expectRun(remountsFirst ? 0 : 1, ["--json", at, destination]);
    expect(next.stderr).toContain(`Finished the restore of ${at} that was interrupted`);
    if (remountsFirst) expect(transfers(next)).toMatchObject([{ parent: had.at(-1)?.[0] }]);
    else {
      expect(next.stderr).toContain("is still mounted there");
      remount();
      expect(uuids(snapshots)).toEqual(had);
      await nextSecond();
      // Another one, killed before it changed any name, keeps no run from its work; the next restore clears it.
      machine.onTop((top) => {
        const left = join(top, "@home.restoring-20260101-000000");
        mkdirSync(left);
        writeFileSync(join(left, ".btrfs-backup.restoring"), "");
        subvolume(join(left, "members"));
      });
      await expectIncremental([at, destination]);
      writeFileSync(join(at, "lost"), "x");
      const again = await expectRun(0, ["restore", "--replace", at, at]);
      expect(again.stderr).toContain("left: /mnt/@home.restoring-20260101-000000 (/mnt stands for");
      remount();
    }
    expect([contentsDigest(at), existsSync(join(at, "lost"))]).toEqual([state, false]);
    expect(uuids(snapshots).slice(0, had.length)).toEqual(had);
    machine.onTop((top) => expect(sh(`find "$1" -name "*.restoring-*"`, top)).toBe(""));
    machine.end();
  }
}, 60_000);

test("over ssh, a whole tree; and with a snapshot folder outside of it", async () => {
  const machine = installed(LAYOUTS.ubuntu);
  const [root, home] = machine.places as [(typeof machine.places)[0], (typeof machine.places)[0]];
  const { options, url } = await sshServer();
  const destination = join(filesystem().path, "backup");
  subvolume(join(home.at, "mail"));
  writeFileSync(join(home.at, "mail/letter"), "dear");
  const args = ["--recursive", ...options, url(home.at), destination];
  await backedUp(args, home.at);
  writeFileSync(join(home.at, "mail/letter"), "lost");
  const { stderr } = await expectRun(0, [
    "restore",
    "--recursive",
    "--replace",
    ...options,
    destination,
    url(home.at),
  ]);
  expect(lastLine(stderr)).toContain(`umount '${home.at}' && mount`);
  home.remount();
  expect(readFileSync(join(home.at, "mail/letter"), "utf8")).toBe("dear");
  expect(existsSync(join(home.at, "lost"))).toBe(false);
  const sent = transfers(await expectRun(0, ["--json", ...args]));
  expect(sent.map(({ parent }) => parent === null)).toEqual([false, false]);
  await nextSecond();

  // The folder is seen through another mount than TARGET.
  const folder = join(root.at, "snaps");
  const second = join(filesystem().path, "backup");
  mkdirSync(folder);
  sh(`btrfs -q subvolume delete "$1" >/dev/null`, join(home.at, "mail"));
  const outside = ["-f", folder, home.at, second];
  const state = await backedUp(outside, home.at);
  const had = uuids(folder);
  for (const from of [second, folder]) {
    writeFileSync(join(home.at, "lost"), "x");
    await expectRun(0, ["restore", "--replace", "-f", folder, from, home.at]);
    home.remount();
    expect([from, contentsDigest(home.at), existsSync(join(home.at, "lost"))]).toEqual([
      from,
      state,
      false,
    ]);
    expect(uuids(folder).slice(0, had.length)).toEqual(had);
  }
  await expectIncremental(outside);
  machine.end();
}, 60_000);

/** Runs a command on a machine whose / is the mount of $1; the rest of this one is bound into it. */
const BOOTED = `set -e; root=$1; shift
  for d in /*; do
    if [ -L "$d" ]; then cp -P "$d" "$root$d" 2>/dev/null || :; elif [ -d "$d" ]; then mkdir -p "$root$d"; mount --rbind "$d" "$root$d"; fi
  done
  cd "$root"; mkdir -p old; pivot_root . old; umount -l /old; exec "$@"`;

test("the root of a running system, by default subvolume: the next start has the restored one", async () => {
  const machine = installed(LAYOUTS.openSUSE);
  const [{ at, remount, name }] = machine.places as [(typeof machine.places)[0]];
  const destination = join(filesystem().path, "backup");
  const booted = { wrapper: ["unshare", "-m", "bash", "-c", BOOTED, "bash", at], cwd: "/" };
  await expectRun(0, ["/", destination], booted);
  const state = contentsDigest(at);
  writeFileSync(join(at, "lost"), "x");
  await nextSecond();
  const restored = await expectRun(0, ["restore", "--json", "--replace", destination, "/"], booted);
  expect(lastLine(restored.stderr)).toContain("reboot");
  expect(restored.stderr).toContain(`${name} is the default subvolume, as the old one was`);
  expect(events(restored).find(({ event }) => event === "restore")).toMatchObject({
    target: "/",
    remount: "reboot",
  });
  expect((await expectRun(1, ["/", destination], booted)).stderr).toContain(
    "is still mounted there: reboot",
  );
  remount();
  expect(sh(`findmnt -no FSROOT "$1"`, at)).toBe(`/${name}`);
  expect([contentsDigest(at), existsSync(join(at, "lost"))]).toEqual([state, false]);
  const [sent] = transfers(await expectRun(0, ["--json", "/", destination], booted));
  expect(sent).toMatchObject({ parent: expect.any(String) as never });
  machine.end();
}, 60_000);
