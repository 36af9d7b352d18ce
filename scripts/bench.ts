// Measures the program against the bare commands and its peers, each pair in turn on the same fresh filesystems, and prints
// medians and what the time is spent on. It is for people: a missed aim is said, not punished. See scripts/bench.

import { mkdirSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { cpus } from "node:os";
import { join } from "node:path";
import {
  cleanUp,
  events,
  expectRun,
  filesystem,
  history,
  linkedServer,
  manyStreams,
  nextSecond,
  ROOT,
  s3Remote,
  sh,
  snapshotAs,
  sshServer,
  start,
  subvolume,
  temporaryDirectory,
} from "../tests/support/rig.ts";

const BINARY = [join(ROOT, "dist/btrfs-backup")];
const ROUNDS = 5;
const MiB = 1 << 20;

const median = (values: readonly number[]) =>
  [...values].sort((a, b) => a - b)[values.length >> 1] as number;
const ms = (value: number) =>
  Math.abs(value) < 10_000 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(1)} s`;
const times = (value: number) => `× ${value.toFixed(2)}`;

/** What is told of a case: both sides, how they compare, what is aimed at, and whether it is reached. */
type Row = readonly [
  what: string,
  ours: string,
  other: string,
  result: string,
  aim: string,
  met: boolean,
];
const slower = (what: string, ours: number, other: number, most: number): Row => [
  what,
  ms(ours),
  ms(other),
  ms(ours - other),
  `≤ ${most} ms more`,
  ours - other <= most,
];
const ratio = (what: string, ours: number, other: number, most: number): Row => [
  what,
  ms(ours),
  ms(other),
  times(ours / other),
  `≤ ${most}`,
  ours / other <= most,
];

/** A few files, as a small subvolume has them. */
const someFiles = (path: string) => sh(`for i in 1 2 3; do echo $i >"$1/$i"; done`, path);

const second = () => Math.floor(Date.now() / 1000);
let named = 0;
/** Runs the program; snapshots are named by the second, so that the next one has to wait for another. */
async function ours(args: readonly string[]) {
  const result = await expectRun(0, args, { env: { TERM: "dumb" } });
  named = second();
  return result;
}
const shell =
  (script: string, ...args: string[]) =>
  async () =>
    void sh(script, ...args);

type Timed = { readonly before?: () => unknown; readonly work: () => Promise<unknown> };
/** Medians of several things in ms, done in turn; the first round warms up, unless all is warm. What comes `before` is not counted. */
async function inTurn(all: readonly Timed[], warm = false): Promise<number[]> {
  const taken = all.map((): number[] => []);
  for (let round = warm ? 1 : 0; round <= ROUNDS; round++)
    for (const [i, { before, work }] of all.entries()) {
      await before?.();
      sh("sync");
      if (second() === named) await nextSecond();
      const began = performance.now();
      await work();
      if (round > 0) taken[i]?.push(performance.now() - began);
    }
  return taken.map(median);
}

/** A source with files of about 4 KiB, and a change of 4 KiB in it. */
function manyFiles(count: number): { source: string; change: () => void } {
  const source = subvolume(join(filesystem({ size: "4G" }).path, "home"));
  sh(
    `cd "$1"; for d in $(seq 1 100); do mkdir $d; head -c $((4096 * $2 / 100)) /dev/urandom | split -a 3 -b 4096 - $d/f; done`,
    source,
    String(count),
  );
  return { source, change: () => sh(`head -c 4096 /dev/urandom >"$1/1/new"`, source) };
}

/** A source with one file, of the same random bytes again and again, and a change of all of them. */
function oneFile(bytes: number, mkfs: string[] = []): { source: string; rewrite: () => void } {
  const source = subvolume(join(filesystem({ size: "8G", mkfs }).path, "home"));
  const block = Math.min(bytes, 16 * MiB);
  const rewrite = () =>
    void sh(
      `head -c "$2" /dev/urandom >"$4"; for i in $(seq "$3"); do cat "$4"; done >"$1/file"`,
      source,
      String(block),
      String(bytes / block),
      join(temporaryDirectory(), "block"),
    );
  rewrite();
  return { source, rewrite };
}

const place = (name: string, size = "8G", mkfs: string[] = []) =>
  join(filesystem({ size, mkfs }).path, name);

/** The shell script of a whole run with bare commands: a snapshot, the difference, and the old ones deleted. */
const BARE = `cd "$1"; old=$(ls -d bare/* | tail -n 1); new=bare/$(date +%s%N); btrfs -q subvolume snapshot -r . "$new" >/dev/null
  btrfs -q send -p "$old" "$new" 2>/dev/null | btrfs -q receive "$2"; btrfs filesystem sync "$2"; btrfs -q subvolume delete "$old" "$2/\${old#bare/}" >/dev/null`;
const BARE_FIRST = `cd "$1"; mkdir -p bare "$2"; btrfs -q subvolume snapshot -r . bare/1 >/dev/null; btrfs -q send bare/1 2>/dev/null | btrfs -q receive "$2"`;

/** btrbk does the same with this configuration: it keeps the newest only. */
function btrbk(
  source: string,
  target: string,
  more: readonly string[] = [],
  env = "",
): Timed["work"] {
  mkdirSync(join(source, "btrbk"), { recursive: true });
  const file = join(temporaryDirectory(), "btrbk.conf");
  const lines = [
    "timestamp_format long-iso",
    "snapshot_preserve_min latest",
    "snapshot_preserve no",
    "target_preserve_min latest",
    "target_preserve no",
    "lockfile /dev/null",
    ...more,
    `volume ${source}`,
    "  subvolume .",
    "    snapshot_name home",
    "    snapshot_dir btrbk",
    `    target ${target}`,
  ];
  writeFileSync(file, `${lines.join("\n")}\n`);
  return shell(`${env} btrbk -q -c "$1" run >&2`, file);
}

const installed = (program: string) => Bun.which(program) !== null;
const missing = (what: string, program: string): Row => [
  what,
  "",
  `${program} is not installed`,
  "",
  "",
  true,
];

/** All processes of a running program, itself included. */
function tree(pid: number): number[] {
  const parents = readdirSync("/proc")
    .filter((name) => /^\d+$/.test(name))
    .flatMap((name) => {
      try {
        return [
          [
            Number(name),
            Number(/\) \S (\d+)/.exec(readFileSync(`/proc/${name}/stat`, "utf8"))?.[1]),
          ] as const,
        ];
      } catch {
        return []; // it has ended meanwhile
      }
    });
  const below = (one: number): number[] => [
    one,
    ...parents.filter(([, parent]) => parent === one).flatMap(([child]) => below(child)),
  ];
  return below(pid);
}

/** Runs the program, and tells how much memory all of its processes took at most together (PSS, in bytes), looked at all the time. */
async function memory(args: readonly string[], env: Record<string, string> = {}): Promise<number> {
  const running = start(args, { env });
  let most = 0;
  let ended = false;
  void running.finished.finally(() => (ended = true));
  while (!ended) {
    const taken = tree(running.pid).map((pid) => {
      try {
        return (
          Number(
            /^Pss:\s+(\d+) kB/m.exec(readFileSync(`/proc/${pid}/smaps_rollup`, "utf8"))?.[1] ?? 0,
          ) * 1024
        );
      } catch {
        return 0;
      }
    });
    most = Math.max(
      most,
      taken.reduce((sum, one) => sum + one, 0),
    );
    await Bun.sleep(10);
  }
  const { status, stderr } = await running.finished;
  if (status !== 0) throw new Error(stderr);
  return most;
}

/** The share of a run's time, in percent, that processors spend on all but btrfs. */
async function besidesBtrfs(args: readonly string[]): Promise<number> {
  const tools = temporaryDirectory();
  writeFileSync(
    join(tools, "btrfs"),
    `#!/bin/sh\n${Bun.which("btrfs")} "$@"; r=$?; times >>${tools}/times; exit $r\n`,
    { mode: 0o755 },
  );
  const began = performance.now();
  const child = Bun.spawn([...BINARY, ...args], {
    stdout: "ignore",
    stderr: "ignore",
    env: { ...process.env, PATH: `${tools}:${process.env["PATH"]}` },
  });
  if ((await child.exited) !== 0) throw new Error(args.join(" "));
  const elapsed = performance.now() - began;
  // User and system time, as 0m0.01s: of the shell, which is only there to measure, and of its child.
  const btrfs = [...readFileSync(join(tools, "times"), "utf8").matchAll(/(\d+)m([\d.]+)s/g)].reduce(
    (sum, [, minutes, seconds]) => sum + Number(minutes) * 60e3 + Number(seconds) * 1e3,
    0,
  );
  return ((Number(child.resourceUsage()?.cpuTime.total ?? 0n) / 1000 - btrfs) / elapsed) * 100;
}

/** As many processes and threads as have been started so far. */
const processes = () => Number(/^processes (\d+)$/m.exec(readFileSync("/proc/stat", "utf8"))?.[1]);

/** A source with one file, far below its top, and so many snapshots; and some places that have backups of all of them. */
async function deep(
  count: number,
  places = 1,
): Promise<{ source: string; snapshots: string; backups: string[]; file: string }> {
  const mkfs = ["--metadata", "single"]; // made in less time than what is written twice
  const source = subvolume(join(filesystem({ size: "8G", mkfs }).path, "home"));
  const file = join(source, "a/b/c/d/e/f/g/h/file");
  sh(`mkdir -p "\${1%/*}"; echo x >"$1"`, file);
  const snapshots = `${source}.snapshots`;
  const backups = Array.from({ length: places }, (_, i) => place(`backup${i}`, "8G", mkfs));
  await ours(["-f", snapshots, source, ...backups]);
  history(source, snapshots, count - 1, backups);
  sh("sync");
  return { source, snapshots, backups, file };
}

/** The rows of the same over ssh, where each destination has already what it had without. */
async function overSsh(
  source: string,
  change: () => void,
  mine: string,
  peer: string,
): Promise<Row[]> {
  const { options, url } = await sshServer();
  const args = ["-N", "1", "-n", "1", ...options, source, url(mine)];
  const wrapper = temporaryDirectory();
  const log = join(wrapper, "log");
  // btrbk knows nothing of known_hosts elsewhere; and what ssh is asked to do is counted.
  const chosen = options
    .filter((option) => option !== "--ssh-opt")
    .map((option) => `-o ${option}`)
    .join(" ");
  writeFileSync(
    join(wrapper, "ssh"),
    `#!/bin/sh\necho "$*" >>${log}\nexec /usr/bin/ssh ${chosen} "$@"\n`,
    { mode: 0o755 },
  );
  const all: Timed[] = [{ before: change, work: () => ours(args) }];
  if (installed("btrbk"))
    all.push({
      before: change,
      work: btrbk(source, url(peer), ["ssh_user root"], `PATH=${wrapper}:$PATH`),
    });
  const [own = 0, other = 0] = await inTurn(all);
  change();
  await nextSecond();
  writeFileSync(log, "");
  await expectRun(0, args, { env: { PATH: `${wrapper}:${process.env["PATH"]}` } });
  const commands = readFileSync(log, "utf8").trim().split("\n");
  const connections = new Set(commands.map((line) => /ControlPath=(\S+)/.exec(line)?.[1])).size;
  return [
    installed("btrbk")
      ? ratio("the same over ssh: btrbk", own, other, 0.25)
      : missing("the same over ssh: btrbk", "btrbk"),
    [
      "the same over ssh: commands over one connection",
      `${commands.length} over ${connections}`,
      "",
      "",
      "≤ 3 over 1",
      commands.length <= 3 && connections === 1,
    ],
  ];
}

const cases: Record<string, () => Promise<Row[]>> = {
  async start() {
    const taken: number[] = [];
    for (let i = 0; i < 30; i++) {
      const began = performance.now();
      sh(`"$1" --version`, ...BINARY);
      const whole = performance.now() - began;
      const empty = performance.now();
      sh(":");
      taken.push(whole - (performance.now() - empty));
    }
    return [["start: --version", ms(median(taken)), "", "", "≤ 40 ms", median(taken) <= 40]];
  },

  async local() {
    const { source, change } = manyFiles(20_000);
    const [mine, bare, peer, python] = [
      place("ours"),
      place("bare"),
      place("btrbk"),
      place("python"),
    ];
    const args = ["-N", "1", "-n", "1", source, mine];
    await ours(args);
    sh(BARE_FIRST, source, bare);
    const all: Timed[] = [
      { before: change, work: () => ours(args) },
      { before: change, work: shell(BARE, source, bare) },
    ];
    if (installed("btrbk")) {
      mkdirSync(peer);
      all.push({ before: change, work: btrbk(source, peer) });
    }
    const old = process.env["BTRFS_BACKUP_PY"];
    if (old !== undefined) {
      mkdirSync(python);
      all.push({
        before: change,
        work: shell(`${old} -q -f python -N 1 -n 1 "$1" "$2" >&2`, source, python),
      });
    }
    const [own = 0, commands = 0, ...peers] = await inTurn(all);
    const what = "local incremental run, 20,000 files, 4 KiB changed";
    const rows = [slower(`${what}: bare commands`, own, commands, 60)];
    rows.push(
      installed("btrbk")
        ? ratio("the same: btrbk", own, peers.shift() as number, 0.6)
        : missing("the same: btrbk", "btrbk"),
    );
    if (old !== undefined)
      rows.push(ratio("the same: btrfs-backup 0.3.1", own, peers.shift() as number, 1));
    profiled = await profile(args, change);
    return [...rows, ...(await overSsh(source, change, mine, peer))];
  },

  async full() {
    const { source } = oneFile(2048 * MiB);
    const [mine, bare] = [place("ours"), place("bare")];
    const args = ["-P", "-I", "-N", "1", "-n", "1", source, mine];
    sh(`mkdir "$1" "$2/bare"`, bare, source);
    const plain = `cd "$1"; new=bare/$(date +%s%N); btrfs -q subvolume snapshot -r . "$new" >/dev/null; btrfs -q send --proto 2 --compressed-data "$new" 2>/dev/null | btrfs -q receive "$2"; btrfs filesystem sync "$2"`;
    const before = () =>
      sh(
        `for s in "$1"/bare/* "$1"/snapshot/* "$2"/* "$3"/*; do [ ! -d "$s" ] || btrfs -q subvolume delete "$s" >/dev/null; done; for s in "$1" "$2" "$3"; do btrfs filesystem sync "\${s%/*}"; done`,
        source,
        bare,
        mine,
      );
    const [own = 0, commands = 0] = await inTurn([
      { before, work: () => ours(args) },
      { before, work: shell(plain, source, bare) },
    ]);
    before();
    await nextSecond();
    const share = await besidesBtrfs(args);
    return [
      ratio("full backup of 2 GiB: btrfs send | btrfs receive", own, commands, 1.03),
      [
        "the same: CPU besides btrfs",
        `${share.toFixed(1)} % of the time`,
        "",
        "",
        "< 2 %",
        share < 2,
      ],
    ];
  },

  async compressed() {
    const mount = "noatime,compress=zstd";
    const source = subvolume(join(filesystem({ size: "4G", mount }).path, "home"));
    sh(
      `set +o pipefail; for i in 1 2 3 4; do seq $((i * 10000000)) 99999999 | head -c 64M >"$1/$i"; done`,
      source,
    );
    const [two, one] = [1, 2].map(() => join(filesystem({ size: "4G", mount }).path, "backup")) as [
      string,
      string,
    ];
    const bytes = { two: 0, one: 0 };
    const sent = async (key: keyof typeof bytes, args: string[]) =>
      void (bytes[key] = events(
        await ours(["--json", "-P", "-I", "-N", "1", "-n", "1", ...args]),
      ).find(({ event }) => event === "transfer")?.["bytes"]);
    const [own = 0, other = 0] = await inTurn([
      { work: () => sent("two", [source, two]) },
      { work: () => sent("one", ["--protocol", "1", source, one]) },
    ]);
    const share = bytes.two / bytes.one;
    return [
      [
        "zstd on both sides, 256 MiB of text: bytes, protocol 1",
        `${(bytes.two / MiB).toFixed(0)} MiB`,
        `${(bytes.one / MiB).toFixed(0)} MiB`,
        times(share),
        "≤ 0.6",
        share <= 0.6,
      ],
      ratio("the same: time", own, other, 1),
    ];
  },

  async two() {
    const { source } = oneFile(256 * MiB);
    const all = [1, 2, 3, 4].map((i) => place(`backup${i}`, "4G"));
    const args = ["-P", "-I", "-N", "1", "-n", "1", source];
    const [own = 0, other = 0] = await inTurn([
      { work: () => ours([...args, ...all.slice(0, 2)]) },
      {
        work: async () => {
          await ours([...args, all[2] as string]);
          await ours(["-S", ...args, all[3] as string]);
        },
      },
    ]);
    return [ratio("two destinations that need the same 256 MiB: two runs", own, other, 0.65)];
  },

  async five() {
    const { source } = oneFile(256 * MiB);
    const all = Array.from({ length: 10 }, (_, i) => place(`backup${i}`, "4G"));
    const args = ["-P", "-I", "-N", "1", "-n", "1", source];
    const [own = 0, other = 0] = await inTurn([
      { work: () => ours([...args, ...all.slice(0, 5)]) },
      {
        work: async () => {
          for (const [i, one] of all.slice(5).entries())
            await ours([...(i === 0 ? [] : ["-S"]), ...args, one]);
        },
      },
    ]);
    return [ratio("five destinations that need the same 256 MiB: five runs", own, other, 0.4)];
  },

  async stored() {
    const { source } = oneFile(2048 * MiB);
    const [mine, bare] = [place("ours"), place("bare")];
    const name = "20260101-000000";
    sh(
      `mkdir -p "$1/snapshot"; btrfs -q subvolume snapshot -r "$1" "$1/snapshot/$2" >/dev/null; mkdir "$3"`,
      source,
      name,
      bare,
    );
    const emptied =
      (...folders: string[]) =>
      () =>
        sh(
          `for f; do cd "$f"; for s in back*/snapshot/2* back* received/2*; do [ ! -d "$s" ] || btrfs -q subvolume delete "$s" >/dev/null; done; btrfs filesystem sync .; btrfs subvolume sync . >/dev/null; done`,
          ...folders,
        );
    const [store = 0, send = 0] = await inTurn([
      {
        before: () => sh(`rm -rf "$1"; sync -f "\${1%/*}"`, mine),
        work: () => ours(["-P", "-S", "--adopt", source, `raw://${mine}`]),
      },
      {
        before: () => sh(`rm -f "$1/file"; sync -f "$1"`, bare),
        work: shell(
          `btrfs -q send "$1/snapshot/$2" >"$3/file" 2>/dev/null; sync -f "$3"`,
          source,
          name,
          bare,
        ),
      },
    ]);
    sh(`mkdir "$1/received"`, bare);
    const [restore = 0, receive = 0] = await inTurn([
      {
        before: emptied(mine, bare),
        work: () => ours(["restore", "-P", `raw://${mine}`, `${mine}/back`]),
      },
      {
        before: emptied(mine, bare),
        work: shell(`btrfs -q receive "$1/received" <"$1/file"; btrfs filesystem sync "$1"`, bare),
      },
    ]);
    return [
      ratio("2 GiB to raw://: btrfs send >file; sync", store, send, 1.1),
      ratio("2 GiB from raw://, checked: btrfs receive <file; sync", restore, receive, 1.1),
    ];
  },

  async guarded() {
    const { source } = oneFile(2048 * MiB);
    const { options, guarded, url } = await sshServer();
    const [mine, free] = [place("guarded"), place("free")];
    for (const folder of [mine, free]) mkdirSync(folder);
    const args = ["-P", "-I", "-N", "1", "-n", "1", "--skip-space-check", source];
    const before = () =>
      sh(
        `for f; do for s in "$f"/*/2* "$f"/2*; do [ ! -d "$s" ] || btrfs -q subvolume delete "$s" >/dev/null; done; btrfs subvolume sync "$f" >/dev/null; done`,
        mine,
        free,
      );
    const key = guarded("--path", mine, "--allow-delete");
    const [own = 0, other = 0] = await inTurn([
      { before, work: () => ours([...key, ...args, url(join(mine, "home"))]) },
      { before, work: () => ours([...options, ...args, url(free)]) },
    ]);
    return [ratio("2 GiB over ssh by a guarded key: unguarded", own, other, 1.05)];
  },

  async resumable() {
    const { source } = oneFile(2048 * MiB);
    const { options, url } = await sshServer();
    const [mine, plain] = [place("resumable"), place("plain")];
    for (const folder of [mine, plain]) mkdirSync(folder);
    const args = ["-P", "-I", "-N", "1", "-n", "1", "--skip-space-check", ...options, source];
    const before = () =>
      sh(
        `for f; do for s in "$f"/2*; do [ ! -d "$s" ] || btrfs -q subvolume delete "$s" >/dev/null; done; btrfs subvolume sync "$f" >/dev/null; done`,
        mine,
        plain,
      );
    const [own = 0, other = 0] = await inTurn([
      { before, work: () => ours(["--resume", ...args, url(mine)]) },
      { before, work: () => ours([...args, url(plain)]) },
    ]);
    return [ratio("2 GiB over ssh with --resume: without", own, other, 2)];
  },

  async verified() {
    const { source } = oneFile(2048 * MiB);
    const backup = place("backup");
    await ours(["-P", source, backup]);
    const tar = `cd "$1"/2*; tar --create --format=posix . | openssl dgst -sha256 >/dev/null`;
    const [own = 0, other = 0] = await inTurn([
      { work: () => ours(["verify", source, backup]) },
      {
        work: async () =>
          void (await Promise.all([shell(tar, join(source, "snapshot"))(), shell(tar, backup)()])),
      },
    ]);
    return [
      ratio(
        "verify of 2 GiB in one file: tar into openssl dgst, on both sides at once",
        own,
        other,
        1.2,
      ),
    ];
  },

  async links() {
    const { source, rewrite } = oneFile(128 * MiB);
    const servers = await Promise.all(
      [1, 2, 3].map(async () => ({ ...(await linkedServer()), path: place("backup") })),
    );
    for (const { url } of servers)
      sh(
        `tc qdisc add dev "$(ip -o route get "$1" | sed 's/.* dev \\([^ ]*\\).*/\\1/')" root tbf rate 400mbit burst 256kb latency 50ms`,
        /@?([\d.]+):/.exec(url(""))?.[1] ?? "",
      );
    const options = servers
      .flatMap(({ options }) => options.filter((option) => option !== "--ssh-opt"))
      .filter((option) => option.startsWith("IdentityFile"))
      .flatMap((option) => ["--ssh-opt", option]);
    const known = join(temporaryDirectory(), "known");
    writeFileSync(
      known,
      servers
        .map(({ options }) =>
          readFileSync(/UserKnownHostsFile=(.*)/.exec(options.at(-1) ?? "")?.[1] ?? "", "utf8"),
        )
        .join(""),
    );
    // Four hosts share the processors here: a cipher that takes little of them.
    const args = [
      "-P",
      "--newest-only",
      ...options,
      "--ssh-opt",
      `UserKnownHostsFile=${known}`,
      "--ssh-opt",
      "Ciphers=aes128-gcm@openssh.com",
      source,
    ];
    const urls = servers.map(({ url, path }) => url(path));
    const fourth = `${urls[0]}-alone`;
    for (let i = 0; i < 3; i++) {
      await ours([...args, ...urls, fourth]);
      await nextSecond();
    }
    // One of them keeps all of its backups, one the oldest two, one the oldest, so that no two have the same newest one.
    const before = () => {
      for (const [i, { path }] of servers.entries())
        if (i > 0)
          sh(
            `cd "$1"; btrfs -q subvolume delete $(ls -d 2* | tail -n "+$2") >/dev/null`,
            path,
            String(4 - i),
          );
      rewrite();
    };
    const [own = 0, alone = 0] = await inTurn(
      [{ before, work: () => ours([...args, ...urls]) }, { work: () => ours([...args, fourth]) }],
      true,
    );
    return [
      ratio(
        "three ssh destinations at 50 MB/s, nothing in common, 128 MiB each: one of them alone",
        own,
        alone,
        1.1,
      ),
    ];
  },

  async history() {
    const measured = [];
    for (const count of [10, 10_000]) {
      const { source, snapshots, backups, file } = await deep(count);
      const args = ["-N", String(count), "-n", String(count), "-f", snapshots, source, ...backups];
      const [taken = 0] = await inTurn([
        { before: () => sh(`date >"$1"`, file), work: () => ours(args) },
      ]);
      await nextSecond();
      const began = processes();
      await ours(args);
      measured.push({ taken, started: processes() - began });
    }
    const [few, many] = measured as [(typeof measured)[0], (typeof measured)[0]];
    const more = many.started - few.started;
    return [
      slower(
        "10,000 snapshots on both sides, one taken, one pruned: 10 snapshots",
        many.taken,
        few.taken,
        300,
      ),
      [
        "the same: processes and threads",
        String(many.started),
        String(few.started),
        `${more} more`,
        "the same",
        Math.abs(more) < 20,
      ],
    ];
  },

  async fleet() {
    const night = async (count: number) => {
      const [a, b] = [filesystem({ size: "4G" }).path, filesystem({ size: "4G" }).path];
      const sources = Array.from({ length: count }, (_, i) => subvolume(join(a, `host${i}`)));
      for (const source of sources) writeFileSync(join(source, "file"), "x".repeat(100_000));
      const all = async () => {
        const taken: number[] = [];
        const waiting = [...sources];
        const began = performance.now();
        await Promise.all(
          [1, 2, 3, 4].map(async () => {
            for (let source = waiting.shift(); source !== undefined; source = waiting.shift()) {
              const began = performance.now();
              await ours([
                "-q",
                "-N",
                "1",
                "-n",
                "1",
                source,
                join(b, source.slice(source.lastIndexOf("/") + 1)),
              ]);
              taken.push(performance.now() - began);
            }
          }),
        );
        return { one: median(taken), whole: performance.now() - began };
      };
      await all(); // in full
      const nights = [];
      for (let i = 0; i < (count > 4 ? 1 : ROUNDS); i++) {
        for (const source of sources) writeFileSync(join(source, "file"), "y".repeat(100_000));
        sh("sync");
        await nextSecond();
        nights.push(await all());
      }
      return {
        one: median(nights.map(({ one }) => one)),
        whole: median(nights.map(({ whole }) => whole)),
      };
    };
    const [few, many] = [await night(4), await night(200)];
    return [
      ratio(
        `200 sources, 4 runs at a time, ${ms(many.whole)} in all; time of a run: 4 sources`,
        many.one,
        few.one,
        1.3,
      ),
    ];
  },

  async memory() {
    // What a hole has replaced is sent as zeros, which take no time to read, nor space on the disk.
    const source = subvolume(join(filesystem({ size: "4G" }).path, "home"));
    const args = ["-P", source, "shell://cat >/dev/null"];
    const sizes = [];
    for (const size of ["1M", "1G"]) {
      sh(
        `cd "$1"; rm -f [0-9]; head -c "$2" /dev/zero >0; for i in 1 2 3 4 5 6 7 8 9; do cp --reflink=always 0 $i; done`,
        source,
        size,
      );
      await ours(args);
      sh(`cd "$1"; for i in [0-9]; do fallocate --punch-hole --length "$2" $i; done`, source, size);
      await nextSecond();
      sizes.push(await memory(args));
    }
    const [few = 0, many = 0] = sizes;
    return [
      [
        "memory of all processes, 10 GiB stream: 10 MiB",
        `${(many / 1e6).toFixed(0)} MB`,
        `${(few / 1e6).toFixed(0)} MB`,
        `${((many - few) / 1e6).toFixed(0)} MB more`,
        "the same, < 120 MB",
        many < 120e6 && many - few < 15e6,
      ],
    ];
  },
};

const memoryRow = (what: string, most: number, aim: number): Row => [
  what,
  `${(most / 1e6).toFixed(0)} MB`,
  "",
  "",
  `≤ ${aim} MB`,
  most <= aim * 1e6,
];
const within = (what: string, ours: number, most: number, other = ""): Row => [
  what,
  ms(ours),
  other,
  "",
  `≤ ${most < 1000 ? ms(most) : `${most / 1000} s`}`,
  ours <= most,
];
/** The time of one of so many things in a row, where a run of one and of several took so long. */
const each = (what: string, ours: number, other: number, count: number, most: number): Row => [
  what,
  `${(ours / count).toFixed(1)} ms`,
  `${(other / count).toFixed(1)} ms`,
  "",
  `≤ ${most} ms`,
  ours / count <= most,
];

/** A source of some bytes, with so many snapshots that differ by one small file. */
function small(count: number): { source: string; snapshots: string } {
  const source = subvolume(join(filesystem({ size: "4G" }).path, "home"));
  sh(
    `mkdir "$1/snapshot"; for i in $(seq "$2"); do echo $i >"$1/file"; btrfs -q subvolume snapshot -r "$1" "$1/snapshot/$(date -d "2026-01-01 + $i hours" +%Y%m%d-%H%M%S)" >/dev/null; done; sync`,
    source,
    String(count),
  );
  return { source, snapshots: join(source, "snapshot") };
}
/** What has to grow with its work, and not with its square; with more than the others have, so that it takes its time. */
const scale: Record<string, () => Promise<Row[]>> = {
  async prune() {
    const {
      backups: [folder = ""],
    } = await deep(10_000);
    const [own = 0, bare = 0] = await inTurn([
      { work: () => ours(["prune", "--dry-run", "-n", "10000", folder]) },
      { work: shell(`btrfs subvolume list -a -s -u "$1" >/dev/null`, folder) },
    ]);
    return [
      within("prune of 10,000 backups, nothing goes: btrfs subvolume list", own, 1000, ms(bare)),
    ];
  },

  async versions() {
    const { source, snapshots, backups, file } = await deep(10_000, 2);
    const args = ["-f", snapshots, file, ...backups];
    const [own = 0] = await inTurn([{ work: () => ours(["versions", ...args]) }]);
    const [list = 0] = await inTurn([
      { work: () => ours(["list", "-f", snapshots, source, ...backups]) },
    ]);
    const most = await memory(["list", "-f", snapshots, source, ...backups]);
    return [
      within("versions of a file in 10,000 snapshots at three places", own, 1000),
      within("list of 10,000 snapshots at three places", list, 400),
      memoryRow("the same: memory of all processes", most, 120),
    ];
  },

  async diff() {
    const source = subvolume(join(filesystem({ size: "8G" }).path, "home"));
    const args = ["diff", "--json", source, "20260101-000000", "20260102-000000"];
    sh(
      `perl -e 'for my $d (1 .. 1000) { mkdir "$ARGV[0]/$d"; for my $f (1 .. 1000) { open(my $o, ">", "$ARGV[0]/$d/file$f") or die; print $o "x" } }' "$1"`,
      source,
    );
    snapshotAs(source, "20260101-000000");
    sh(
      `cd "$1"; for d in $(seq 1 50 1000); do head -c $((4096 * 1000)) /dev/urandom | split -a 3 -d -b 4096 - $d/x; for f in $d/x*; do mv $f \${f%x*}file$((10#\${f##*x} + 1)); done; done; sync`,
      source,
    );
    snapshotAs(source, "20260102-000000");
    const [own = 0, bare = 0] = await inTurn([
      { work: () => ours(args) },
      {
        work: shell(
          `btrfs send -q --no-data -p "$1/snapshot/20260101-000000" "$1/snapshot/20260102-000000" >/dev/null`,
          source,
        ),
      },
    ]);
    const { changed } = events(await ours(args)).at(-1) as Record<string, unknown>;
    return [
      within(
        `diff of ${String(changed)} changed files among a million: btrfs send alone`,
        own,
        10_000,
        ms(bare),
      ),
      memoryRow("the same: memory of all processes", await memory(args), 250),
    ];
  },

  async deletions() {
    const { source } = small(1);
    const stores: [string, number, string][] = [
      [`raw://${place("raw")}`, 10_000, "5000"],
      [`rclone://:local:${place("rclone")}`, 200, "100"],
    ];
    const rows: Row[] = [];
    for (const [store, count, kept] of stores) {
      const folder = store.replace(/^.*:(\/\/)?(?=\/)/, "");
      await ours(["-S", source, store]);
      const [own = 0] = await inTurn([
        {
          before: () => manyStreams(folder, count),
          work: () => ours(["prune", "-n", kept, store]),
        },
      ]);
      rows.push(
        within(
          `prune of ${count} streams in ${store.split(":")[0]}://, ${kept} stay`,
          own,
          count > 1000 ? 1500 : 500,
        ),
      );
    }
    return rows;
  },

  async prefixes() {
    const { source } = small(1);
    const folder = place("backup");
    mkdirSync(folder);
    for (let i = 0; i < 200; i++)
      await ours(["-q", "-f", `snapshots${i}`, "-p", `host${i}-`, source, folder]);
    const [prune = 0] = await inTurn([{ work: () => ours(["prune", "-n", "5", folder]) }]);
    const copies = place("copy");
    const began = performance.now();
    await ours(["copy", folder, copies]);
    const copy = performance.now() - began;
    return [
      within("prune of 200 prefixes in one folder, nothing goes", prune, 300),
      each("copy of 200 prefixes in one folder, for each", copy, 0, 200, 15),
    ];
  },

  async small() {
    const count = 60;
    const { source, snapshots } = small(count + 1);
    const [mine, bare] = [place("backup"), place("bare")];
    sh(
      `cd "$1"; mkdir "$2"; btrfs -q send "$(ls | head -n 1)" 2>/dev/null | btrfs -q receive "$2"`,
      snapshots,
      bare,
    );
    const clear = (folder: string) => () =>
      sh(
        `cd "$1" 2>/dev/null || exit 0; rm -f ./*.sha256 ./*-*.btrfs* 2>/dev/null; for s in $(ls | tail -n +2); do btrfs -q subvolume delete "$s" >/dev/null 2>&1 || rm -f "$s"; done`,
        folder,
      );
    await ours(["-S", source, mine]);
    const raw = place("raw");
    let round = 0;
    const [folder = 0, store = 0, other = 0] = await inTurn([
      { before: clear(mine), work: () => ours(["-S", "--backfill", source, mine]) },
      {
        before: () => round++,
        work: () => ours(["-S", "--full-every", "0", source, `raw://${raw}${round}`]),
      },
      {
        before: clear(bare),
        work: shell(
          `cd "$1"; old=; for new in *; do [ -z "$old" ] || btrfs -q send -p "$old" "$new" 2>/dev/null | btrfs -q receive "$2"; old=$new; done; btrfs filesystem sync "$2"`,
          snapshots,
          bare,
        ),
      },
    ]);
    const chain = `raw://${raw}${round}`;
    const target = `${mine}-restored`;
    const [restore = 0] = await inTurn([
      {
        before: () =>
          sh(`[ ! -d "$1" ] || btrfs -q subvolume delete "$1"/snapshot/* "$1" >/dev/null`, target),
        work: () => ours(["restore", chain, target]),
      },
    ]);
    const [verify = 0] = await inTurn([{ work: () => ours(["verify", chain]) }]);
    return [
      each("a small transfer of 60 in a row, to btrfs: send | receive", folder, other, count, 10),
      each("the same to raw://", store, other, count, 12),
      each(
        "a piece of a chain of 60, restored from raw://: send | receive",
        restore,
        other,
        count,
        20,
      ),
      each("a small stream of 60, verified", verify, 0, count, 1),
    ];
  },

  async s3() {
    const { source } = oneFile(1024 * MiB);
    const { env, url } = await s3Remote();
    const rows: Row[] = [];
    for (const options of [[], ["--compress", "zstd"]]) {
      const most = await memory(["-P", ...options, source, url(`home${rows.length}`)], env);
      rows.push(
        memoryRow(
          `1 GiB to S3${options.length > 0 ? " with --compress zstd" : ""}: memory of all processes`,
          most,
          150,
        ),
      );
      await nextSecond();
    }
    return rows;
  },

  async tree() {
    const { source, rewrite } = oneFile(4096);
    for (let i = 1; i < 100; i++) someFiles(subvolume(join(source, `m${i}`)));
    const one = oneFile(4096);
    const [tree, single, bare] = [place("tree"), place("single"), join(source, "..", "bare")];
    const policies = ["-N", "1", "-n", "1"];
    await ours([...policies, "--recursive", source, tree]);
    await ours([...policies, one.source, single]);
    const [all = 0, changed = 0, run = 0, snapshots = 0] = await inTurn([
      { before: rewrite, work: () => ours([...policies, "--recursive", source, tree]) },
      {
        before: rewrite,
        work: () => ours([...policies, "--recursive", "--if-changed", source, tree]),
      },
      { before: one.rewrite, work: () => ours([...policies, one.source, single]) },
      {
        before: () => sh(`mkdir -p "$1"; btrfs -q subvolume delete "$1"/* 2>/dev/null || :`, bare),
        work: shell(
          `for i in $(seq 99); do btrfs -q subvolume snapshot -r "$1/m$i" "$2/m$i" >/dev/null; done`,
          source,
          bare,
        ),
      },
    ]);
    const what = "100 subvolumes, one changed: a run over one, and 100 bare snapshots";
    return [
      ratio(what, all, run + snapshots, 1.5),
      ratio("the same with --if-changed", changed, run + snapshots, 1.5),
    ];
  },

  async strangers() {
    const taken = [];
    for (const count of [0, 10_000]) {
      const { source, rewrite } = oneFile(4096);
      const backups = place("backup");
      const args = ["-N", "1", "-n", "1", source, backups];
      await ours(args);
      sh(
        `mkdir "$1.others"; [ "$2" = 0 ] || { btrfs -q subvolume snapshot "$1" "$1.0" >/dev/null; perl -e '
        sub dir { open(my $d, "<", $_[0]) or die "$_[0]: $!"; $d } my ($s, $in) = map { dir($_) } @ARGV;
        for my $i (1 .. ${count}) { ioctl($in, 0x50009417, pack("q Q Q x32 a4040", fileno($s), 0, 2, $i)) or die "$!" }' "$1.0" "$1.others"; sync; }`,
        source,
        String(count),
      );
      taken.push((await inTurn([{ before: rewrite, work: () => ours(args) }]))[0] ?? 0);
    }
    const [few = 0, many = 0] = taken;
    return [
      slower(
        "a run with 10,000 other subvolumes on the source's filesystem: without",
        many,
        few,
        50,
      ),
    ];
  },
};

let profiled = "";
/** What begins with the line of the debug log that matches: what the time of a local run is spent on. */
const PHASES: readonly (readonly [what: string, begins: RegExp])[] = [
  ["starting: the runtime, and what it imports", /^/],
  ["looking at both sides, and locking them", /\] open /],
  ["the snapshot", /\] snapshot /],
  ["send | receive, announced before and found complete after", /\] pipeline:/],
  ["the record of what both sides share", /\] record /],
  ["deleting on both sides, and letting go of the locks", /\] delete /],
];
/** Medians of the phases of some runs, each in ms, and how many processes a run starts. */
async function profile(args: readonly string[], change: () => void): Promise<string> {
  const taken = PHASES.map((): number[] => []);
  let started = 0;
  for (let round = 0; round < ROUNDS; round++) {
    change();
    sh("sync");
    await nextSecond();
    const before = processes();
    const began = performance.now();
    const child = Bun.spawn([...BINARY, "-v", "debug", ...args], {
      stdout: "ignore",
      stderr: "pipe",
    });
    const at = PHASES.map((_, i) => (i === 0 ? 0 : NaN));
    const decoder = new TextDecoder();
    for await (const chunk of child.stderr)
      for (const line of decoder.decode(chunk).split("\n"))
        for (const [i, [, begins]] of PHASES.entries())
          if (Number.isNaN(at[i]) && begins.test(line)) at[i] = performance.now() - began;
    await child.exited;
    started = processes() - before;
    at.push(performance.now() - began);
    taken.forEach((all, i) => all.push((at[i + 1] as number) - (at[i] as number)));
  }
  return [
    ...PHASES.map(([what], i) => `${ms(median(taken[i] as number[])).padStart(8)}  ${what}`),
    `${String(started).padStart(8)}  processes and threads`,
  ].join("\n");
}

const asked = process.argv.slice(2).filter((word) => word !== "--scale");
const chosen = process.argv.includes("--scale") ? scale : cases;
const unknown = asked.find((name) => !Object.hasOwn(chosen, name));
if (unknown !== undefined) {
  console.error(`there is no row ${unknown}: ${Object.keys(chosen).join(", ")}`);
  process.exit(2);
}
const rows: Row[] = [["case: compared with", "ours", "other", "result", "aim", true]];
try {
  for (const [name, measure] of Object.entries(chosen)) {
    if (asked.length > 0 && !asked.includes(name)) continue;
    const began = performance.now();
    rows.push(...(await measure()));
    console.error(`${name}: ${ms(performance.now() - began)}`);
    cleanUp();
  }
} finally {
  cleanUp();
}
const widths = [0, 1, 2, 3, 4].map((column) =>
  Math.max(...rows.map((row) => String(row[column]).length)),
);
for (const row of rows)
  console.log(
    `${row
      .slice(0, 5)
      .map((cell, column) => String(cell).padEnd(widths[column] as number))
      .join("  ")}  ${row === rows[0] ? "" : row[5] ? "reached" : "MISSED"}`.trimEnd(),
  );
console.log(
  `\n${cpus().length} × ${cpus()[0]?.model}, ${sh("uname -sr; btrfs --version").replaceAll("\n", ", ")}, filesystems in ${process.env["TMPDIR"]?.split("/").slice(0, 3).join("/")}`,
);
if (profiled !== "")
  console.log(`\nWhat a local incremental run spends its time on, medians:\n${profiled}`);
