// What does not answer, or does nothing any more, costs a limit and not the night: the snapshot is taken, the others
// are served, locks are let go, and the run ends, also where processes cannot be ended.

import { afterEach, describe, expect, test } from "bun:test";
import { spawn, spawnSync } from "node:child_process";
import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readFileSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { join } from "node:path";
import { descendants, signal } from "./support/processes.ts";
import {
  expectRun,
  expectSound,
  filesystem,
  history,
  nextSecond,
  pair,
  ROOT,
  run,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  temporaryDirectory,
  transfers,
  waitFor,
} from "./support/rig.ts";

const thaws: (() => void)[] = [];
afterEach(() => {
  for (const thaw of thaws.splice(0)) thaw();
});
/** A filesystem on which whatever writes waits, until the test is over or `thaw` is called. */
function freeze(path: string): () => void {
  sh(`fsfreeze -f "$1"`, path);
  let isFrozen = true;
  const thaw = () => {
    if (isFrozen) sh(`fsfreeze -u "$1"`, path);
    isFrozen = false;
  };
  thaws.push(thaw);
  return thaw;
}
/** A source with some data, and a folder on each of so many disks. */
function sourceAnd(disks: number): { source: string; snapshots: string; places: [string, string] } {
  const source = subvolume(join(filesystem().path, "home"));
  sh(`head -c 3M /dev/urandom >"$1/file"`, source);
  const places = Array.from({ length: disks }, () => join(filesystem().path, "backup"));
  return { source, snapshots: join(source, "snapshot"), places: places as [string, string] };
}
const limit = ["--timeout", "3"];
const LATE = /no answer within 3 s|stuck: for 3 s no byte moved/;

describe("a disk that does not answer", () => {
  test("when the run begins: the snapshot is taken, the others are served, and the next run finds no lock", async () => {
    const {
      source,
      snapshots,
      places: [well, hung],
    } = sourceAnd(2);
    await expectRun(0, [source, well, hung]);
    const thaw = freeze(join(hung, ".."));
    for (const _ of [1, 2]) {
      await nextSecond();
      const result = await expectRun(1, ["--json", ...limit, source, well, hung]);
      expect(transfers(result).map(({ destination }) => destination)).toEqual([well]);
      // What the first one left there cannot end as long as the disk does not answer.
      expect(result.stderr).toMatch(
        new RegExp(`${LATE.source}|an earlier transfer is still being received`),
      );
      expect(result.stderr).toContain(`[error] ${hung}: `);
    }
    thaw();
    // What was left there ends now.
    await waitFor(
      "the disk to be free",
      async () =>
        (await run(["list", hung])).status === 0 &&
        spawnSync("flock", ["-n", join(hung, "..", "backup"), "true"]).status === 0,
    );
    await nextSecond();
    const after = await expectRun(0, ["--json", "--wait", "20", source, well, hung]);
    expect(transfers(after).every(({ parent }) => parent !== null)).toBe(true);
    expectSound(hung, snapshots);
  });

  test("when it is the only one, and in the middle of a transfer: the run ends, and the next one is incremental", async () => {
    const {
      source,
      snapshots,
      places: [hung],
    } = sourceAnd(1);
    await expectRun(0, [source, hung]);
    sh(`head -c 20M /dev/urandom >"$1/file"`, source);
    await nextSecond();
    const running = start([...limit, "--rate-limit", "4m", source, hung]);
    const [first] = snapshotNames(snapshots);
    await waitFor("it to receive", () => snapshotNames(hung).some((name) => name !== first));
    const thaw = freeze(join(hung, ".."));
    const { status, stderr } = await running.finished;
    expect([status, LATE.test(stderr)]).toEqual([1, true]);
    thaw();
    const after = await expectRun(0, ["--json", "--wait", "20", "-S", source, hung]);
    expect(transfers(after).map(({ parent }) => parent)).toEqual([first]);
    expectSound(hung, snapshots);
  });

  test.each([[["list"]], [["verify"]], [["prune", "-n", "1"]], [["unpin", "--all"]]])(
    "ends %s as well",
    async (command) => {
      const {
        source,
        places: [hung],
      } = sourceAnd(1);
      await expectRun(0, [source, hung]);
      await nextSecond();
      await expectRun(0, [source, hung]);
      const about = command[0] === "unpin" ? source : hung;
      freeze(join(about, ".."));
      const result = await run([
        ...command,
        ...limit,
        ...(command[0] === "verify" ? [source] : []),
        about,
      ]);
      // Looking writes nothing, and can be answered.
      const writes = command[0] === "prune" || command[0] === "unpin";
      expect([result.status, LATE.test(result.stderr)]).toEqual(writes ? [1, true] : [0, false]);
    },
  );
});

describe("a path that does not answer", () => {
  /** A folder in which every name that is looked up waits for an automounter that has stopped. */
  async function hanging(): Promise<string> {
    const directory = temporaryDirectory();
    const folder = join(directory, "auto");
    mkdirSync(folder);
    writeFileSync(join(directory, "master"), `${folder} file,sun:${directory}/map --timeout=600\n`);
    writeFileSync(join(directory, "map"), "* -fstype=tmpfs :tmpfs\n");
    sh(`modprobe autofs4 2>/dev/null || modprobe autofs 2>/dev/null || :`);
    const automount = spawn("/usr/sbin/automount", ["-f", "-n", "1", join(directory, "master")], {
      detached: true,
      stdio: "ignore",
    });
    const gone = new Promise((done) => automount.on("close", done));
    await waitFor(
      "automount",
      () =>
        new RegExp(` ${folder} .* - autofs `).test(readFileSync("/proc/self/mountinfo", "utf8")),
      20,
    );
    automount.kill("SIGSTOP");
    thaws.push(() => {
      automount.kill("SIGKILL");
      sh(`umount -l "$1" 2>/dev/null || :`, folder);
    });
    void gone;
    return join(folder, "disk");
  }

  test("keeps no snapshot from being taken, nor another destination, nor the metrics from being an error", async () => {
    const {
      source,
      snapshots,
      places: [well],
    } = sourceAnd(1);
    const hung = await hanging();
    for (const [what, args] of [
      ["a destination", [well, hung]],
      ["a store", [well, `raw://${hung}`]],
      ["the metrics", [well, "--metrics", join(hung, "x.prom")]],
    ] as const) {
      await nextSecond();
      const before = existsSync(snapshots) ? snapshotNames(snapshots).length : 0;
      const result = await run(["--json", ...limit, source, ...args]);
      expect([
        what,
        result.status,
        transfers(result).map(({ destination }) => destination),
        snapshotNames(snapshots).length - before,
      ]).toEqual([what, 1, [well], 1]);
      expect(result.stderr).toMatch(LATE);
    }
  });

  test("ends what only looks, restores or copies back", async () => {
    const {
      source,
      places: [well],
    } = sourceAnd(1);
    await expectRun(0, [source, well]);
    const hung = await hanging();
    const [name] = snapshotNames(join(source, "snapshot")) as [string];
    const commands = [
      ["list", hung],
      ["verify", source, hung],
      ["prune", "-n", "3", hung],
      ["unpin", "--all", hung],
      [hung, well],
      ["restore", well, join(hung, "x")],
      ["restore", hung, join(source, "../x")],
      ["copy", well, hung],
      ["copy", hung, well],
      ["versions", join(hung, "file")],
      ["versions", join(source, "file"), "--get", name, "--to", join(hung, "y")],
    ];
    const results = await Promise.all(
      commands.map(async (command) => ({ command, ...(await run([...command, ...limit])) })),
    );
    expect(
      results.filter(({ status, stderr }) => (status !== 1 && status !== 2) || !LATE.test(stderr)),
    ).toEqual([]);
  });
});

describe("a login that never ends", () => {
  test("keeps neither the snapshot nor another destination waiting", async () => {
    const {
      source,
      snapshots,
      places: [well, far],
    } = sourceAnd(2);
    const { options, url, user } = await sshServer();
    const shell = join(temporaryDirectory(), "never");
    writeFileSync(shell, "#!/bin/sh\nexec sleep 1000\n", { mode: 0o755 });
    user("never", shell);
    const running = start([
      "--json",
      ...options,
      "--timeout",
      "6",
      source,
      well,
      url(far, "never"),
    ]);
    await waitFor(
      "the snapshot",
      () => existsSync(snapshots) && snapshotNames(snapshots).length === 1,
      5,
    );
    const result = await running.finished;
    expect([result.status, transfers(result).map(({ destination }) => destination)]).toEqual([
      1,
      [well],
    ]);
    expect(result.stderr).toContain("no answer within 6 s");
  });
});

/** The process that receives into a folder. */
async function receiverIn(folder: string): Promise<number> {
  const all = () =>
    sh(
      `for p in /proc/[0-9]*; do
    case $(tr '\\0' ' ' <$p/cmdline 2>/dev/null) in "btrfs receive "*) if [ "$(stat -L -c %d $p/cwd)" = "$(stat -c %d "$1")" ]; then echo \${p#/proc/}; fi;; esac
  done`,
      folder,
    )
      .split("\n")
      .filter(Boolean)
      .map(Number);
  await waitFor("a receiver", () => all().length === 1);
  return all()[0] as number;
}

describe("a transfer", () => {
  /** A PATH on which `btrfs receive` does something else before it begins. */
  function receiving(script: string): string {
    const tools = temporaryDirectory();
    writeFileSync(
      join(tools, "btrfs"),
      `#!/bin/sh\nPATH=\${PATH#*:}\n${script}\nexec btrfs "$@"\n`,
      { mode: 0o755 },
    );
    return `${tools}:${process.env["PATH"]}`;
  }
  const WORKS = `case $1 in receive) i=0; end=$(($(date +%s) + 9)); while [ "$(date +%s)" -lt $end ]; do i=$((i + 1)); done;; esac`;

  test("in which nothing moves but a process works is not stuck, here and on another host", async () => {
    const {
      source,
      snapshots,
      places: [here, there],
    } = sourceAnd(2);
    await expectRun(0, [...limit, source, here], { env: { PATH: receiving(WORKS) } });
    expectSound(here, snapshots);
    const { options, url, user } = await sshServer();
    const shell = join(temporaryDirectory(), "works");
    writeFileSync(shell, `#!/bin/sh\nPATH=${receiving(WORKS)}\nexport PATH\nexec sh "$@"\n`, {
      mode: 0o755,
    });
    user("works", shell);
    await expectRun(0, [...options, ...limit, "-S", source, url(there, "works")]);
    expectSound(there, snapshots);
  });

  test("in which nobody does anything is, here and on another host: the others finish", async () => {
    const { options, url } = await sshServer();
    for (const far of [false, true]) {
      const {
        source,
        snapshots,
        places: [well, stopped],
      } = sourceAnd(2);
      sh(`head -c 12M /dev/urandom >"$1/file"`, source);
      const id = far ? url(stopped) : stopped;
      const running = start([
        "--json",
        "--protocol",
        "1",
        ...options,
        ...limit,
        "--rate-limit",
        "4m",
        source,
        well,
        id,
      ]);
      await waitFor("both to receive", () =>
        [well, stopped].every((place) => existsSync(place) && snapshotNames(place).length === 1),
      );
      const pid = await receiverIn(stopped);
      process.kill(pid, "SIGSTOP");
      try {
        const result = await running.finished;
        expect([
          far,
          result.status,
          transfers(result).map(({ destination }) => destination),
        ]).toEqual([far, 1, [well]]);
        expect(result.stderr).toContain("stuck: for 3 s no byte moved");
      } finally {
        signal(pid);
      }
      expectSound(well, snapshots);
      await expectRun(0, ["--wait", "20", "--protocol", "1", ...options, "-S", source, well, id]);
      expectSound(stopped, snapshots);
    }
  });

  test("in which the stream is made slowly is not, though a destination was waited for before", async () => {
    const {
      source,
      places: [one, other],
    } = sourceAnd(2);
    sh(`head -c 40M /dev/urandom >"$1/file"`, source);
    const running = start([
      "--json",
      "--protocol",
      "1",
      "--timeout",
      "4",
      "--rate-limit",
      "4m",
      source,
      one,
      other,
    ]);
    const sends = () =>
      descendants(running.pid).find(
        ({ text }) => /^(\S*\/)?btrfs send -q/.test(text) && !text.includes("--no-data"),
      )?.pid;
    const pid = await receiverIn(one);
    process.kill(pid, "SIGSTOP");
    await waitFor("the relay to wait for it", () =>
      sh(`cat /run/btrfs-backup.${running.pid}.*/p*/*.now 2>/dev/null || :`)
        .split("\n")
        .some((line) => / /.test(line)),
    );
    const sending = sends() as number;
    process.kill(sending, "SIGSTOP");
    process.kill(pid, "SIGCONT");
    // Now nobody does anything, and it is the source's fault.
    const { status, stderr } = await running.finished;
    expect([status, stderr.includes("btrfs receive: stuck")]).toEqual([1, false]);
    expect(stderr).toContain("stuck: for 4 s no byte moved");
    signal(sending);
  });

  test("waits longer while the disk writes what it has, and says so", async () => {
    const {
      source,
      snapshots,
      places: [well],
    } = sourceAnd(1);
    const slow = receiving(`case "$1 $2" in "filesystem sync") sleep 9;; esac`);
    const { stderr } = await expectRun(0, [...limit, source, well], { env: { PATH: slow } });
    expect(stderr).toContain("waiting for the disk to have everything (btrfs filesystem sync)");
    expectSound(well, snapshots);
  });

  test("with a guarded key may be silent while the client works", async () => {
    const {
      source,
      snapshots,
      places: [place],
    } = sourceAnd(1);
    mkdirSync(place);
    const { guarded, url } = await sshServer();
    const tools = temporaryDirectory();
    writeFileSync(
      join(tools, "btrfs"),
      `#!/bin/sh\nPATH=\${PATH#*:}\ncase "$*" in "send "*--no-data*) ;; "send "*) end=$(($(date +%s) + 9)); while [ "$(date +%s)" -lt $end ]; do :; done;; esac\nexec btrfs "$@"\n`,
      { mode: 0o755 },
    );
    await expectRun(
      0,
      [...guarded("--path", place, "--timeout", "3"), ...limit, source, url(place)],
      { env: { PATH: `${tools}:${process.env["PATH"]}` } },
    );
    expectSound(place, snapshots);
  });

  test("with a guarded key, which does nothing any more, is ended on the server, too", async () => {
    const {
      source,
      places: [stopped],
    } = sourceAnd(1);
    sh(`head -c 12M /dev/urandom >"$1/file"; mkdir -p "$2"`, source, stopped);
    const { guarded, url } = await sshServer();
    const key = guarded("--path", stopped, "--timeout", "3");
    const running = start([...key, "--timeout", "60", "--rate-limit", "4m", source, url(stopped)]);
    await waitFor("it to receive", () => snapshotNames(stopped).length === 1);
    const pid = await receiverIn(stopped);
    process.kill(pid, "SIGSTOP");
    try {
      const result = await running.finished;
      expect([result.status, result.stderr.includes("--timeout")]).toEqual([1, true]);
    } finally {
      signal(pid);
    }
  });
});

describe("a standard output that nobody reads", () => {
  /** A list that is longer than a pipe, which nobody reads. */
  function unread() {
    const { source, snapshots } = pair();
    mkdirSync(snapshots);
    history(source, snapshots, 900, []);
    const pipe = join(temporaryDirectory(), "pipe");
    sh(`mkfifo "$1"`, pipe);
    const output = openSync(pipe, "r+");
    const child = spawn(join(ROOT, "dist/btrfs-backup"), ["list", "--json", source], {
      stdio: ["ignore", output, "ignore"],
    });
    const ended = new Promise<[number | null, string | null]>((done) =>
      child.on("exit", (status, how) => done([status, how])),
    ).finally(() => closeSync(output));
    return { pid: child.pid as number, ended };
  }

  test("is given up after a while", async () => {
    const { ended } = unread();
    expect(await ended).toEqual([1, null]);
  });

  test("is given up at the first signal", async () => {
    const { pid, ended } = unread();
    const written = () =>
      Number(/^wchar: (\d+)/m.exec(readFileSync(`/proc/${pid}/io`, "utf8"))?.[1]);
    await waitFor(
      "it to wait for its reader",
      () => descendants(pid).length === 0 && written() >= 65_536,
    );
    process.kill(pid, "SIGTERM");
    expect(await ended).toEqual([143, null]);
  });

  test("keeps no lock of a run that a record's location has ended", async () => {
    const { source, snapshots, destination } = pair();
    snapshotAs(source, "20260101-000000");
    await expectRun(0, ["-S", source, destination]);
    const record = join(snapshots, ".btrfs-backup.json");
    writeFileSync(record, readFileSync(record, "utf8").replace(destination, "nfs://elsewhere"));
    const pipe = join(temporaryDirectory(), "pipe");
    sh(`mkfifo "$1"`, pipe);
    const output = openSync(pipe, "r+");
    writeSync(output, Buffer.alloc(65_536));
    const child = spawn(
      join(ROOT, "dist/btrfs-backup"),
      ["-S", "--json", "--locked-dests", source],
      { stdio: ["ignore", output, "pipe"] },
    );
    let told = "";
    child.stderr?.on("data", (data) => (told += data));
    const ended = new Promise((done) => child.on("exit", done));
    try {
      await waitFor("the error", () => told.includes("cannot be used (unpin it)"));
      await waitFor("the lock's end", () => descendants(child.pid as number).length === 0, 5);
      expect(child.exitCode).toBeNull(); // it still waits for its reader
    } finally {
      child.kill("SIGTERM");
      await ended;
      closeSync(output);
    }
  });
});
