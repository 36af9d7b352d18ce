// Whatever ends a run, and whenever: nothing is lost, nothing half is taken for whole, the next
// run repairs by itself; and two runs never work on the same chain.

import { expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  change,
  events,
  expectRun,
  expectSound,
  filesystem,
  holdLock,
  nextSecond,
  pair,
  run,
  sh,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  subvolumes,
  temporaryDirectory,
  waitFor,
} from "./support/rig.ts";
import { generator, seeded, soak } from "./support/random.ts";
import { killAll } from "./support/processes.ts";

/** A `pv` in front of every `btrfs receive`, so that a transfer takes its time. */
function slowReceive(): { env: Record<string, string> } {
  const directory = temporaryDirectory();
  const real = sh("command -v btrfs");
  writeFileSync(
    join(directory, "btrfs"),
    `#!/bin/bash\nif [ "$1" = receive ]; then exec ${real} "$@" < <(exec pv -q -L 5m); fi\nexec ${real} "$@"\n`,
    { mode: 0o755 },
  );
  return { env: { PATH: `${directory}:${process.env["PATH"]}` } };
}

/** A first backup, and a second one in the middle of its transfer. */
async function transferUnderWay() {
  const made = pair();
  const { source, destination } = made;
  await expectRun(0, [source, destination]);
  sh(`head -c 20M /dev/urandom >"$1/large"`, source);
  await nextSecond();
  const running = start([source, destination], slowReceive());
  await waitFor("the transfer", () => receiving(destination));
  return { ...made, running };
}

const receiving = (folder: string) =>
  existsSync(folder) &&
  [...subvolumesSafely(folder).values()].some(
    ({ readonly, receivedUuid }) => !readonly && receivedUuid === null,
  );
function subvolumesSafely(folder: string) {
  try {
    return subvolumes(folder);
  } catch {
    return new Map<string, never>(); // it changed while we looked
  }
}
/** The streams that are under way; a test file has a namespace of processes of its own. */
const streams = () => sh(`pgrep -f "$1" || :`, "^btrfs (send|receive) ");
const announced = (folder: string) =>
  readFileSync(join(folder, ".btrfs-backup.json"), "utf8").includes('"receiving"');

for (const [signal, status] of [
  ["SIGINT", 130],
  ["SIGTERM", 143],
] as const)
  test(`${signal} in a transfer stops every child, removes what was half received, and exits ${status}`, async () => {
    const { source, snapshots, destination, running } = await transferUnderWay();
    running.child.kill(signal);
    const result = await running.finished;
    expect([result.status, result.stderr]).toEqual([
      status,
      expect.stringContaining(`interrupted by ${signal}`),
    ]);
    expect(streams()).toBe("");
    expect(snapshotNames(destination).length).toBe(1);
    expect(announced(destination)).toBe(false);
    await expectRun(0, ["-S", source, destination]);
    expectSound(destination, snapshots);
    expect(snapshotNames(destination).length).toBe(2);
  });

test("Ctrl-C over ssh cleans up on the other side", async () => {
  const { source, destination } = pair();
  const { options, url } = await sshServer();
  await expectRun(0, [...options, source, url(destination)]);
  sh(`head -c 200M /dev/urandom >"$1/large"`, source);
  await nextSecond();
  const running = start([...options, source, url(destination)], { group: true });
  await waitFor("the transfer", () => receiving(destination));
  process.kill(-running.pid, "SIGINT"); // as a terminal does: to the whole foreground group
  expect((await running.finished).status).toBe(130);
  expect(snapshotNames(destination).length).toBe(1);
  expect(announced(destination)).toBe(false);
  await expectRun(0, [...options, "-S", source, url(destination)]);
  expect(snapshotNames(destination).length).toBe(2);
});

test("a signal while waiting for a lock ends the run at once", async () => {
  const { source, snapshots, destination } = pair();
  await expectRun(0, [source, destination]);
  const holder = await holdLock(join(snapshots, ".btrfs-backup..lock"));
  const running = start(["--wait", "600", source, destination]);
  await waitFor("the run to wait", () => sh(`pgrep -f "^flock -w 600 9$" || :`) !== "");
  running.child.kill("SIGTERM");
  expect((await running.finished).status).toBe(143);
  await holder();
});

test("Ctrl-C in a hook, and while rclone lists, leaves nothing in the directory for temporary files", async () => {
  const source = subvolume(join(filesystem().path, "home"));
  const [own, bin] = [temporaryDirectory(), temporaryDirectory()];
  const begun = join(bin, "begun");
  const waiting = `touch ${begun}; exec sleep 600`;
  writeFileSync(
    join(bin, "rclone"),
    `#!/bin/bash\ncase $1 in listremotes) echo "x: s3";; lsf) ${waiting};; *) exec sleep 600;; esac\n`,
    { mode: 0o755 },
  );
  const env = { TMPDIR: own, PATH: `${bin}:${process.env["PATH"]}` };
  for (const words of [
    ["--before-snapshot", waiting, source],
    ["list", "rclone://x:y"],
  ]) {
    const running = start(words, { env, group: true });
    await waitFor("what waits", () => existsSync(begun));
    process.kill(-running.pid, "SIGINT");
    expect((await running.finished).status).toBe(130);
    rmSync(begun);
    await waitFor("its end", () => sh(`pgrep -f "^sleep 600" || :`) === "");
    expect([words, readdirSync(own)]).toEqual([words, []]);
  }
});

test("a busy source is exit 3, a busy destination is its own failure, and --wait waits", async () => {
  const { source, snapshots, destination } = pair();
  const other = join(filesystem().path, "other");
  await expectRun(0, [source, destination, other]);
  const atSource = await holdLock(join(snapshots, ".btrfs-backup..lock"));
  await waitFor(
    "the lock",
    () =>
      sh(`flock -n "$1" true && echo free || echo held`, join(snapshots, ".btrfs-backup..lock")) ===
      "held",
  );
  expect((await expectRun(3, [source, destination])).stderr).toContain("another run holds");
  await nextSecond();
  await expectRun(0, ["-p", "another-chain-", source]);
  const waiting = start(["--wait", "100", source, other]);
  await waitFor("the run to wait", () => sh(`pgrep -f "^flock -w 100 9$" || :`) !== "");
  await atSource();
  expect((await waiting.finished).status).toBe(0);
  const atDestination = await holdLock(join(destination, ".btrfs-backup..lock"));
  await waitFor(
    "the lock",
    () =>
      sh(
        `flock -n "$1" true && echo free || echo held`,
        join(destination, ".btrfs-backup..lock"),
      ) === "held",
  );
  await nextSecond();
  expect((await expectRun(1, [source, destination, other])).stderr).toContain("another run holds");
  expect(snapshotNames(other).length).toBe(3);
  await atDestination();
});

test("destinations are opened beside the source, but nothing of them is locked before it is, and nothing is left of them if it cannot be", async () => {
  const { source, snapshots, destination } = pair();
  const other = join(filesystem().path, "other");
  await expectRun(0, [source, destination, other]);
  const tools = temporaryDirectory();
  writeFileSync(
    join(tools, "flock"),
    `#!/bin/sh\n[ "$3" != 9 ] || stat -c %d/%i . >>${tools}/log\nexec ${sh("command -v flock")} "$@"\n`,
    { mode: 0o755 },
  );
  const locked = () =>
    existsSync(join(tools, "log"))
      ? readFileSync(join(tools, "log"), "utf8").trim().split("\n")
      : [];
  const env = { PATH: `${tools}:${process.env["PATH"]}` };
  const holder = await holdLock(join(snapshots, ".btrfs-backup..lock"));
  await waitFor(
    "the lock",
    () =>
      sh(`flock -n "$1" true && echo free || echo held`, join(snapshots, ".btrfs-backup..lock")) ===
      "held",
  );
  for (const wait of [["--wait", "1"], []])
    await expectRun(3, [...wait, source, other, destination], { env });
  // Behind the fence a path begins elsewhere: a directory is told by its inode.
  const inode = (path: string) => sh(`stat -c %d/%i "$1"`, path);
  expect(locked()).toEqual([snapshots, snapshots].map(inode));
  expect(sh(`pgrep -f "$1" || :`, `btrfs-backup[:].*${destination}`)).toBe("");
  expect(snapshotNames(snapshots).length).toBe(1);
  await holder();
  await nextSecond();
  await expectRun(0, ["--wait", "1", source, other, destination], { env });
  expect(locked().slice(2)).toEqual([snapshots, ...[destination, other].sort()].map(inode));
  expect((await expectRun(2, [join(source, "plain"), destination], { env })).stderr).toContain(
    "not a subvolume",
  );
  expect(locked().length).toBe(5);
});

test("what was opened beside a source that is refused after all is let go, and not waited for where it hangs", async () => {
  const { source, snapshots, destination, a } = pair();
  const { options, url } = await sshServer();
  await expectRun(0, [source, destination]);
  const tools = temporaryDirectory();
  const env = { PATH: `${tools}:${process.env["PATH"]}` };
  // The snapshot folder is another source's: that is known when it is locked.
  const stranger = subvolume(join(a.path, "stranger"));
  const hanging = join(filesystem().path, "hanging");
  await expectRun(0, [stranger, hanging]);
  writeFileSync(
    join(tools, "stat"),
    `#!/bin/sh\ncase $PWD in ${snapshots}) until [ -e ${tools}/hangs ]; do sleep 0.01; done;; ${hanging}) : >${tools}/hangs; exec sleep infinity;; esac\nexec ${sh("command -v stat")} "$@"\n`,
    { mode: 0o755 },
  );
  expect((await expectRun(1, ["-f", snapshots, stranger, hanging], { env })).stderr).toContain(
    "belong",
  );
  expect(sh(`pgrep -f "$1" || :`, `btrfs-backup[:].*${hanging}`)).toBe("");
  // A connection that is lost just then: the next try finds all free.
  writeFileSync(
    join(tools, "ssh"),
    `#!/bin/bash
    if [[ \${!#} == *btrfs-backup:open* ]] && mkdir ${tools}/lost 2>/dev/null; then
      /usr/bin/ssh "$@" | sed "/ locked$/q"
      until pgrep -P $PPID -x cat >/dev/null; do sleep 0.01; done
      echo "client_loop: send disconnect: Broken pipe" >&2; exit 255
    fi
    exec /usr/bin/ssh "$@"\n`,
    { mode: 0o755 },
  );
  await nextSecond();
  await expectRun(
    0,
    [...options, "--ssh-opt", "ServerAliveInterval=1", "--retries", "1", url(source), destination],
    { env },
  );
  expect(existsSync(join(tools, "lost"))).toBe(true);
  expect(snapshotNames(destination).length).toBe(2);
  expectSound(destination, snapshots);
});

test("a folder that another run makes meanwhile is not mixed up with the one above", async () => {
  const { source, destination, a } = pair();
  await expectRun(0, [source, destination]);
  const other = subvolume(join(a.path, "other"));
  const tools = temporaryDirectory();
  const inner = join(destination, "inner");
  writeFileSync(
    join(tools, "stat"),
    `#!/bin/sh\n[ "$PWD" != ${destination} ] || mkdir -p ${inner}\nexec ${sh("command -v stat")} "$@"\n`,
    { mode: 0o755 },
  );
  const before = readFileSync(join(destination, ".btrfs-backup.json"), "utf8");
  await expectRun(0, [other, inner], { env: { PATH: `${tools}:${process.env["PATH"]}` } });
  expectSound(inner, join(other, "snapshot"));
  expect(existsSync(join(inner, ".btrfs-backup..lock"))).toBe(true);
  expect(readFileSync(join(destination, ".btrfs-backup.json"), "utf8")).toBe(before);
});

test("whether something is still received there is asked of its lock, whatever the record says", async () => {
  const { source, snapshots, destination } = pair();
  await expectRun(0, [source, destination]);
  writeFileSync(join(destination, ".btrfs-backup.json"), "nonsense");
  const lock = join(destination, ".btrfs-backup..receiving");
  const holder = await holdLock(join(destination, ".btrfs-backup..receiving"));
  await waitFor(
    "the lock",
    () => sh(`flock -n "$1" true && echo free || echo held`, lock) === "held",
  );
  await nextSecond();
  expect((await expectRun(1, ["--adopt", source, destination])).stderr).toContain(
    "an earlier transfer is still being received",
  );
  const waiting = start(["-S", "--adopt", "--wait", "100", source, destination]);
  await waitFor("the run to wait", () => sh(`pgrep -f "^flock -w 100 8$" || :`) !== "");
  await holder();
  const { status, stderr } = await waiting.finished;
  expect([status, stderr]).toEqual([
    1,
    expect.stringContaining("nothing is deleted there: its .btrfs-backup.json cannot be read"),
  ]);
  expectSound(destination, snapshots);
  expect(snapshotNames(destination).length).toBe(2);
});

test("after kill -9 of the program alone, the next run does not race its pipeline", async () => {
  const { source, snapshots, destination, running } = await transferUnderWay();
  running.child.kill("SIGKILL");
  expect(receiving(destination)).toBe(true);
  const early = await run(["-S", source, destination]);
  expect([early.status, early.stderr]).toEqual([
    1,
    expect.stringContaining("still being received"),
  ]);
  // Left alone it comes to its end, and what it leaves is whole.
  const late = await expectRun(0, ["-S", "--wait", "300", "--json", source, destination]);
  expect(events(late).filter(({ event }) => event === "transfer")).toEqual([]);
  expectSound(destination, snapshots);
  expect(snapshotNames(destination).length).toBe(2);
});

test("after kill -9 of everything, the leftover is removed and sent again", async () => {
  const { source, snapshots, destination, running } = await transferUnderWay();
  running.child.kill("SIGKILL");
  killAll(new RegExp(`btrfs.*${destination}|^btrfs (send|receive) `));
  killAll(/^pv -q -L 5m$/); // what slows it down holds its lock as well
  await waitFor("the receiver's end", () => streams() === "");
  expect(receiving(destination)).toBe(true);
  await expectRun(0, ["-S", source, destination]);
  expectSound(destination, snapshots);
  expect(snapshotNames(destination).length).toBe(2);
});

test("a receive that was killed between its last two steps is a leftover, too", async () => {
  const { source, snapshots, destination } = pair();
  await expectRun(0, [source, destination]);
  // Writable, with a received UUID, and announced: the state between the two ioctls.
  const [name] = snapshotNames(destination) as [string];
  sh(
    `cp "$1/.btrfs-backup.json" "$1/saved"; btrfs property set -f -ts "$1/$2" ro false`,
    destination,
    name,
  );
  const record = readFileSync(join(destination, "saved"), "utf8").replace(
    '{"owner"',
    `{"receiving":"${name}","owner"`,
  );
  writeFileSync(join(destination, ".btrfs-backup.json"), record);
  await expectRun(0, ["-S", source, destination]);
  expectSound(destination, snapshots);
  expect(announced(destination)).toBe(false);
});

test("an announcement ends when its backup is found complete", async () => {
  const { source, destination } = pair();
  await expectRun(0, [source, destination]);
  const [name] = snapshotNames(destination) as [string];
  const file = join(destination, ".btrfs-backup.json");
  writeFileSync(
    file,
    readFileSync(file, "utf8").replace('{"owner"', `{"receiving":"${name}","owner"`),
  );
  await expectRun(0, ["-S", source, destination]);
  expect(announced(destination)).toBe(false);
});

test("a half-received subvolume that was not announced is no leftover", async () => {
  const { source, destination } = pair();
  await expectRun(0, [source, destination]);
  await nextSecond();
  await expectRun(0, [source]);
  const [, young] = snapshotNames(join(source, "snapshot")) as [string, string];
  sh(`btrfs -q subvolume create "$1" >/dev/null; echo mine >"$1/mine"`, join(destination, young));
  await expectRun(1, ["-S", source, destination]);
  expect(readFileSync(join(destination, young, "mine"), "utf8")).toBe("mine\n");
});

test("kill -9 at random moments: one ordinary run afterwards, and everything is whole", async () => {
  const random = seeded();
  const { source, snapshots, destination, a, b } = pair({ size: "2G" });
  const second = join(b.path, "second");
  sh(
    `mkdir "$1" "$2"; for d in "$1" "$2"; do btrfs -q subvolume create "$d/20200101-000000-mine" >/dev/null; mkdir "$d/20200102-000000"; echo mine >"$d/20200102-000000/file"; done`,
    join(a.path, "x"),
    destination,
  );
  const foreign = () =>
    sh(
      `cd "$1"; find 20200101-000000-mine 20200102-000000 -printf '%p %i %T@\\n'; cat 20200102-000000/file`,
      destination,
    );
  const before = foreign();
  await expectRun(0, [source, destination, second]);
  const rounds = soak(8);
  let killed = 0;
  for (let round = 0; round < rounds; round++) {
    change(source, random);
    sh(`head -c "$2" /dev/urandom >"$1/large"`, source, String(Math.floor(random() * 3e7)));
    await nextSecond();
    const began = start(["-N", "3", "-n", "3", source, destination, second], { group: true });
    await Bun.sleep(random() * 500);
    // Half of the time the whole of it, as a power failure would; its pipeline has a group of its own.
    if (round % 2 === 0) {
      sh(`kill -KILL -- "-$1" 2>/dev/null || :`, String(began.pid));
      killAll(new RegExp(`btrfs.*${b.path}|^btrfs (send|receive) `));
    } else began.child.kill("SIGKILL");
    const { signal } = await began.finished;
    if (signal === "SIGKILL") killed++;
    await nextSecond();
    await expectRun(0, ["-N", "3", "-n", "3", "--wait", "60", source, destination, second]);
    for (const folder of [destination, second]) expectSound(folder, snapshots);
    expect(snapshotNames(destination).at(-1)).toBe(snapshotNames(snapshots).at(-1) as string);
  }
  expect(foreign()).toBe(before);
  console.log(
    `${rounds} rounds, ${killed} killed before they had ended; ${snapshotNames(destination).length} backups are left`,
  );
});

test("two runs of one chain at a time, in loops: each waits or leaves, nothing breaks", async () => {
  const random = generator(3);
  const { source, snapshots, destination } = pair();
  await Promise.all(
    [0, 1, 2].map(async (n) => {
      for (let i = 0; i < 4; i++) {
        if (n === 0) change(source, random);
        const { status, stderr } = await run([
          ...(n === 2 ? [] : ["--wait", "60"]),
          "-N",
          "2",
          "-n",
          "2",
          source,
          destination,
        ]);
        expect({ stderr, fine: (n === 2 ? [0, 3] : [0]).includes(status as number) }).toMatchObject(
          { fine: true },
        );
      }
    }),
  );
  expectSound(destination, snapshots);
  expect(snapshotNames(destination).length).toBe(2);
});
