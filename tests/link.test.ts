// Links that die: both ends of a run end, nothing stays behind, and the next run is ordinary. The
// link is a real one, between two network namespaces.

import { expect, test } from "bun:test";
import { existsSync, readdirSync } from "node:fs";
import { dirname, join } from "node:path";
import {
  events,
  expectRun,
  expectSound,
  linkedServer,
  loginShells,
  nextSecond,
  pair,
  sh,
  snapshotNames,
  start,
  subvolumes,
  temporaryDirectory,
  waitFor,
} from "./support/rig.ts";

/** Heartbeats and keep-alives every second, so that silence is noticed after some. */
const FAST = ["--ssh-opt", "ServerAliveInterval=1", "--ssh-opt", "ConnectTimeout=2"];
/** What a run started there, or here: verbs, and btrfs at work on a path. */
const atWork = (path: string) =>
  sh(
    `pgrep -af '[b]trfs-backup:(open|send|receive|store|fetch|restoring)' | grep -F "$1" || :; pgrep -af '^btrfs (send|receive)' || :`,
    path,
  );
const lockOf = (folder: string) =>
  sh(`flock -n "$1" echo free || echo held`, join(folder, ".btrfs-backup..lock"));
const incomplete = (folder: string) =>
  existsSync(folder) && [...subvolumes(folder).values()].some(({ readonly }) => !readonly);

for (const [shell, path] of Object.entries(loginShells()).filter(([name]) =>
  ["bash", "dash", "ash"].includes(name),
))
  test(`a dead link ends a run here, and the receive, the send and the locks there (${shell})`, async () => {
    const { source, snapshots, destination, b } = pair();
    const server = await linkedServer();
    server.user(`link-${shell}`, path);
    const url = (path: string) => server.url(path, `link-${shell}`);
    const options = [...server.options, ...FAST];
    const stored = join(b.path, "stored");
    await expectRun(0, [
      ...options,
      source,
      url(destination),
      url(stored).replace(/^ssh:/, "raw+ssh:"),
    ]);
    const cases = [
      {
        args: [source, url(destination)],
        there: destination,
        busy: () => incomplete(destination),
        lock: destination,
      },
      {
        args: [source, url(stored).replace(/^ssh:/, "raw+ssh:")],
        there: stored,
        busy: () => readdirSync(stored).some((name) => name.endsWith(".part")),
        lock: stored,
      },
      {
        args: [url(source), destination],
        there: snapshots,
        busy: () => incomplete(destination),
        lock: snapshots,
      },
    ];
    for (const { args, there, busy, lock } of shell === "dash" ? cases : cases.slice(0, 1)) {
      await nextSecond();
      sh(`head -c 40M /dev/urandom >"$1/large"`, source);
      const running = start([...options, "--rate-limit", "5m", ...args]);
      await waitFor("the transfer", busy);
      server.cut();
      const { status, stderr } = await running.finished;
      expect([status, stderr]).toEqual([1, expect.stringMatching(/the connection is lost/)]);
      await waitFor("the other side", () => atWork(there) === "");
      expect(lockOf(lock)).toBe("free");
      server.mend();
      await expectRun(0, [...options, "-S", ...args]);
      expect(incomplete(destination)).toBe(false);
    }
    expectSound(destination, snapshots);
    expect(snapshotNames(destination)).toEqual(snapshotNames(snapshots));
    await expectRun(0, ["verify", `raw://${stored}`]);
  });

test("a transfer that is slow but alive is never ended, however long it takes", async () => {
  const { source, snapshots, destination, b } = pair();
  const server = await linkedServer();
  sh(`head -c 10M /dev/urandom >"$1/large"`, source);
  // Silence ends the other side after 4 s; this takes twice as long.
  const args = [
    ...server.options,
    ...FAST,
    "--json",
    "--rate-limit",
    "1300k",
    source,
    server.url(destination),
    server.url(join(b.path, "stored")).replace(/^ssh:/, "raw+ssh:"),
  ];
  const result = await expectRun(0, args);
  for (const { seconds } of events(result).filter(({ event }) => event === "transfer"))
    expect(seconds).toBeGreaterThan(5);
  expectSound(destination, snapshots);
});

test("a run that is stopped, not ended, is given up by the other side, which leaves nothing behind", async () => {
  const { source, destination } = pair();
  const server = await linkedServer();
  await expectRun(0, [...server.options, source, server.url(destination)]);
  sh(`head -c 40M /dev/urandom >"$1/large"`, source);
  await nextSecond();
  const running = start([
    ...server.options,
    ...FAST,
    "--rate-limit",
    "5m",
    source,
    server.url(destination),
  ]);
  await waitFor("the transfer", () => incomplete(destination));
  running.child.kill("SIGSTOP");
  await waitFor("the other side", () => atWork(destination) === "");
  expect(lockOf(destination)).toBe("free");
  running.child.kill("SIGKILL");
  await running.finished;
  await expectRun(0, [...server.options, "--wait", "60", "-S", source, server.url(destination)]);
  expect(incomplete(destination)).toBe(false);
  expect(snapshotNames(destination).length).toBe(2);
});

test("with --ssh-sudo, what runs as root over there ends as well", async () => {
  const { source, snapshots, destination } = pair();
  const server = await linkedServer();
  server.user("linksaver", "/bin/sh", 4712);
  const sudoers = join(temporaryDirectory(), "sudoers");
  sh(
    `echo 'linksaver ALL=(root) NOPASSWD: /usr/bin/btrfs' >"$1"; chmod 440 "$1"; mount --bind "$1" /etc/sudoers`,
    sudoers,
  );
  try {
    sh(`mkdir "$1" "$2"; chown 4712 "$1" "$2"`, snapshots, destination);
    const options = [...server.options, ...FAST, "--ssh-sudo"];
    const url = (path: string) => server.url(path, "linksaver");
    await expectRun(0, [...options, source, url(destination)]);
    const other = join(dirname(destination), "other");
    for (const [args, there, busy] of [
      [[source, url(destination)], destination, destination],
      [[url(source), other], snapshots, other],
    ] as const) {
      await nextSecond();
      sh(
        `head -c 40M /dev/urandom >"$1/large"; chown -f 4712 "$2"/.btrfs-backup*`,
        source,
        snapshots,
      );
      const running = start([...options, "--rate-limit", "5m", ...args]);
      await waitFor("the transfer", () => incomplete(busy));
      server.cut();
      expect((await running.finished).status).toBe(1);
      await waitFor("the other side", () => atWork(there) === "");
      expect(lockOf(there)).toBe("free");
      server.mend();
      await expectRun(0, [...options, "-S", "--newest-only", ...args]);
      expect(incomplete(busy)).toBe(false);
    }
    expectSound(destination, snapshots);
  } finally {
    sh("umount /etc/sudoers");
  }
});
