// Real parts for the tests: loop-mounted btrfs filesystems, an sshd, an S3 server, a gpg key, and
// the program itself. Everything lives in TMPDIR and in the mount and process namespaces that
// scripts/test makes, so that nothing outlives a test run, however it ends.

import { afterAll, expect } from "bun:test";
import { spawn, spawnSync, type ChildProcess } from "node:child_process";
import {
  chmodSync,
  mkdirSync,
  mkdtempSync,
  readFileSync,
  readlinkSync,
  rmSync,
  writeFileSync,
} from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { generator } from "./random.ts";

// A certificate of the machine's own is of no use on loopback, and keeps rclone's S3 from starting.
delete process.env["AWS_CA_BUNDLE"];

const rig = process.env["BTRFS_BACKUP_RIG"];
if (rig !== "test" && rig !== "bench")
  throw new Error("run this with scripts/test or scripts/bench: it needs namespaces of its own");

export const ROOT = resolve(import.meta.dir, "../..");

const cleanups: (() => void)[] = [];
/** Takes away what was made here, the newest first. */
export function cleanUp(): void {
  for (const cleanup of cleanups.splice(0).reverse())
    try {
      cleanup();
    } catch (error) {
      console.error(String(error)); // the namespaces end what is left
    }
}
if (rig === "test") afterAll(cleanUp);

/** Runs a bash script with positional parameters; its standard output. Throws what it wrote to stderr. */
export function sh(script: string, ...args: string[]): string {
  const { status, stdout, stderr } = spawnSync(
    "bash",
    ["-c", `set -euo pipefail; ${script}`, "sh", ...args],
    { encoding: "utf8", maxBuffer: 1 << 28 },
  );
  if (status !== 0) throw new Error(`${script}\n${args.join("\n")}\nexit ${status}: ${stderr}`);
  return stdout.replace(/\n+$/, "");
}

/** A new directory on the disk, which other users can enter. */
export function temporaryDirectory(): string {
  const path = mkdtempSync(join(tmpdir(), "t-"));
  chmodSync(path, 0o755);
  return path;
}

/** Waits until something is so; who asks by starting processes asks less often. */
export async function waitFor(
  what: string,
  condition: () => boolean | Promise<boolean>,
  seconds = 60,
): Promise<void> {
  const until = Date.now() + seconds * 1000;
  for (;;) {
    const asked = Date.now();
    if (await condition()) return;
    if (asked > until) throw new Error(`waited ${seconds} s in vain for ${what}`);
    await Bun.sleep(Math.min(50, Math.max(10, 2 * (Date.now() - asked))));
  }
}

export type Filesystem = { readonly path: string; readonly image: string; readonly uuid: string };

/** A btrfs filesystem in a sparse file, mounted. */
export function filesystem({
  size = "1G",
  mkfs = [] as string[],
  mount = "noatime",
} = {}): Filesystem {
  const directory = temporaryDirectory();
  const image = join(directory, "image");
  const path = join(directory, "mnt");
  mkdirSync(path);
  // As few processes as possible: many tests make many of them.
  const uuid = crypto.randomUUID();
  sh(
    `truncate -s "$1" "$2"; mkfs.btrfs -q -U "$4" "\${@:6}" "$2" >/dev/null 2>&1; mount -o "loop,$5" "$2" "$3"`,
    size,
    image,
    path,
    uuid,
    mount,
    ...mkfs,
  );
  cleanups.push(() =>
    sh(`while umount -l "$1" 2>/dev/null; do :; done; rm -rf "$2"`, path, directory),
  );
  return { path, image, uuid };
}

export const mountImage = (
  { path, image }: Pick<Filesystem, "path" | "image">,
  options = "noatime",
) => sh(`mount -o "loop,$3" "$1" "$2"`, image, path, options);
/** The disaster: all that was on a filesystem is gone. */
export const reformat = ({ path, image }: Pick<Filesystem, "path" | "image">) =>
  // What was at work behind a fence keeps the old one alive until it has ended.
  sh(
    `uuid=$(btrfs filesystem show "$1" | sed -n 's/.*uuid: //p'); umount "$1"; for i in $(seq 600); do [ -e "/sys/fs/btrfs/$uuid" ] || break; sleep 0.05; done; mkfs.btrfs -q -f "$2" >/dev/null 2>&1; mount -o loop,noatime "$2" "$1"`,
    path,
    image,
  );
export const unmount = ({ path }: Pick<Filesystem, "path">) => sh(`umount "$1"`, path);

/** A new subvolume on a filesystem. */
export function subvolume(path: string): string {
  sh(`btrfs -q subvolume create "$1" >/dev/null`, path);
  return path;
}

export type Standing = {
  readonly id: number;
  readonly uuid: string;
  readonly parentUuid: string | null;
  readonly receivedUuid: string | null;
  readonly readonly: boolean;
};

/** The subvolumes directly in a folder, asked of btrfs one by one, not in the program's way. */
export function subvolumes(folder: string): Map<string, Standing> {
  const shown = sh(
    `cd "$1"; find . -mindepth 1 -maxdepth 1 -inum 256 -printf '%P\\0' | sort -z |
      while IFS= read -rd '' name; do printf '%s\\0' "$name"; btrfs subvolume show "./$name"; btrfs property get -ts "./$name" ro; printf '\\0'; done`,
    folder,
  ).split("\0");
  return new Map(
    Array.from({ length: shown.length >> 1 }, (_, i) => {
      const [name = "", text = ""] = shown.slice(2 * i);
      const field = (label: string) =>
        new RegExp(`^\\s+${label}:\\s+(\\S+)`, "m").exec(text)?.[1] ?? "-";
      const uuid = (label: string) => (field(label) === "-" ? null : field(label));
      return [
        name,
        {
          id: Number(field("Subvolume ID")),
          uuid: field("UUID"),
          parentUuid: uuid("Parent UUID"),
          receivedUuid: uuid("Received UUID"),
          readonly: text.includes("ro=true"),
        },
      ];
    }),
  );
}

/** A read-only snapshot in the snapshot folder, as if a run had taken it at the time of that name. */
export const snapshotAs = (source: string, name: string) =>
  sh(
    `mkdir -p "$1/snapshot"; btrfs -q subvolume snapshot -r "$1" "$1/snapshot/$2" >/dev/null`,
    source,
    name,
  );

/** A directory with every program of this machine but one: a PATH on which it is missing. */
export function pathWithout(...missing: string[]): string {
  const tools = temporaryDirectory();
  sh(
    `cd "$1"; shift; for d in /usr/sbin /usr/bin; do ln -sf $d/* .; done; rm -f -- "$@"`,
    tools,
    ...missing,
  );
  return tools;
}

/** The names in a folder that are snapshots of a prefix. */
export const snapshotNames = (folder: string, prefix = "") =>
  [...subvolumes(folder).keys()].filter(
    (name) => name.startsWith(prefix) && /^\d{8}-\d{6}$/.test(name.slice(prefix.length)),
  );

export type How =
  | "bun"
  | "binary"
  | "baseline"
  | "arm64"
  | "deno"
  | "one file by bun"
  | "one file by deno"
  | "one file by node";
const BIN = join(ROOT, "node_modules/.bin");
export const PROGRAM: Record<How, string[]> = {
  bun: [join(BIN, "bun"), join(ROOT, "btrfs-backup.ts")],
  binary: [join(ROOT, "dist/btrfs-backup")],
  baseline: [join(ROOT, "dist/btrfs-backup-linux-x64-baseline")],
  arm64: [
    "qemu-aarch64-static",
    "-L",
    "/usr/aarch64-linux-gnu",
    join(ROOT, "dist/btrfs-backup-linux-arm64"),
  ],
  deno: [join(BIN, "deno"), "run", "-A", join(ROOT, "btrfs-backup.ts")],
  "one file by bun": [join(BIN, "bun"), join(ROOT, "dist/btrfs-backup.js")],
  "one file by deno": [join(BIN, "deno"), "run", "-A", join(ROOT, "dist/btrfs-backup.js")],
  "one file by node": ["node", join(ROOT, "dist/btrfs-backup.js")],
};

/** `how`: a way to run the program, or the words of a command that is it. */
export type Options = {
  how?: How | string[];
  env?: Record<string, string>;
  cwd?: string;
  wrapper?: string[];
  group?: boolean;
};
export type Result = {
  readonly status: number | null;
  readonly signal: string | null;
  readonly stdout: string;
  readonly stderr: string;
};
export type Running = {
  readonly child: ChildProcess;
  readonly pid: number;
  readonly finished: Promise<Result>;
  readonly stderr: () => string;
};

/** Starts the program; `group`: in a process group of its own. */
export function start(
  args: readonly string[],
  { how = "binary", env = {}, cwd = ROOT, wrapper = [], group = false }: Options = {},
): Running {
  const [program, ...words] = [
    ...wrapper,
    ...(typeof how === "string" ? PROGRAM[how] : how),
    ...args,
  ] as [string, ...string[]];
  const child = spawn(program, words, {
    cwd,
    env: {
      ...process.env,
      NODE_ENV: undefined,
      NO_COLOR: "1",
      ...(how === "arm64" ? { BTRFS_BACKUP_RELAY: PROGRAM.arm64.join(" ") } : {}),
      ...env,
    },
    stdio: ["ignore", "pipe", "pipe"],
    detached: group,
  });
  let stdout = "";
  let stderr = "";
  child.stdout?.on("data", (data) => (stdout += data));
  child.stderr?.on("data", (data) => (stderr += data));
  const finished = new Promise<Result>((done, fail) => {
    child.on("error", fail);
    child.on("close", (status, signal) => done({ status, signal, stdout, stderr }));
  });
  return { child, pid: child.pid as number, finished, stderr: () => stderr };
}

/** Runs the program to its end. */
export const run = (args: readonly string[], options?: Options) => start(args, options).finished;

/** Runs the program and expects an exit status; its output. */
export async function expectRun(
  status: number,
  args: readonly string[],
  options?: Options,
): Promise<Result> {
  const result = await run(args, options);
  if (result.status !== status)
    throw new Error(
      `btrfs-backup ${args.join(" ")}\nexit ${result.status ?? result.signal}, not ${status}:\n${result.stderr}\n${result.stdout}`,
    );
  return result;
}

/** The events that `--json` printed. */
export const events = ({ stdout }: Result) =>
  stdout
    .split("\n")
    .filter(Boolean)
    .map((line) => JSON.parse(line) as Record<string, any>);

/** Waits until the clock shows another second than the last snapshot's name. */
export const nextSecond = () => Bun.sleep(1001 - (Date.now() % 1000));

async function freePort(): Promise<number> {
  const server = createServer();
  await new Promise<void>((done) => server.listen(0, "127.0.0.1", done));
  const { port } = server.address() as { port: number };
  await new Promise((done) => server.close(done));
  return port;
}

const answers = (port: number, address = "127.0.0.1") =>
  spawnSync("bash", ["-c", `exec 3<>/dev/tcp/${address}/${port}`]).status === 0;

/** Starts a daemon of the tests; it ends with them. */
function daemon(command: string, args: string[], env: Record<string, string> = {}): void {
  const child = spawn(command, args, { env: { ...process.env, ...env }, stdio: "ignore" });
  child.unref();
  cleanups.push(() => void child.kill());
}

/** `guarded`: the options to log in with a new key, whose forced command is the program with those arguments of `guard`. */
export type SshServer = {
  readonly options: string[];
  readonly guarded: (...args: string[]) => string[];
  readonly url: (path: string, user?: string) => string;
  readonly user: (name: string, shell: string, uid?: number) => void;
};

let server: Promise<SshServer> | null = null;
/** One real sshd for all tests of a process, and a key of its own to log in with. */
export const sshServer = () => (server ??= startSshServer());

export type LinkedServer = SshServer & {
  readonly cut: () => void;
  readonly mend: () => void;
  readonly crossed: () => number;
};

let links = 0;

/** An sshd at the other end of a link that can be cut: in a network namespace of its own. `crossed`: bytes sent over it, both ways. */
export async function linkedServer(): Promise<LinkedServer> {
  const namespace = spawn("unshare", ["--net", "sleep", "infinity"], { stdio: "ignore" });
  const device = `link${++links}`;
  const net = `198.18.${links}`;
  cleanups.push(() => {
    sh(`ip link delete "$1"`, device); // sockets of dead connections keep the namespace for a while
    namespace.kill("SIGKILL");
  });
  const pid = String(namespace.pid);
  await waitFor(
    "a network namespace",
    () => readlinkSync(`/proc/${pid}/ns/net`) !== readlinkSync("/proc/self/ns/net"),
  );
  sh(`ip link add "$1" type veth peer name "$1" netns "$2"`, device, pid);
  sh(`ip address add "$2.1/24" dev "$1"; ip link set "$1" up`, device, net);
  sh(
    `nsenter --target "$2" --net sh -c 'ip address add "$2.2/24" dev "$1"; ip link set "$1" up; ip link set lo up' sh "$1" "$3"`,
    device,
    pid,
    net,
  );
  // Each end knows the other's address: to ask for it takes long on a busy machine, and can fail.
  const introduce = () =>
    void sh(
      `mac() { "$@" ip -br link show dev "$device" | sed "s/.* \\(..:..:..:..:..:..\\) .*/\\1/"; }
      device=$1; near=$(mac env); far=$(mac nsenter --target "$2" --net)
      ip neighbour replace "$3.2" lladdr "$far" nud permanent dev "$1"
      nsenter --target "$2" --net ip neighbour replace "$3.1" lladdr "$near" nud permanent dev "$1"`,
      device,
      pid,
      net,
    );
  introduce();
  const server = await startSshServer(`${net}.2`, ["nsenter", "--target", pid, "--net"]);
  return {
    ...server,
    cut: () => void sh(`nsenter --target "$2" --net ip link set "$1" down`, device, pid),
    mend: () => {
      sh(`nsenter --target "$2" --net ip link set "$1" up`, device, pid);
      introduce();
    },
    crossed: () => {
      const [{ stats64 }] = JSON.parse(sh(`ip -j -s link show dev "$1"`, device)) as [
        { stats64: Record<"rx" | "tx", { bytes: number }> },
      ];
      return stats64.rx.bytes + stats64.tx.bytes;
    },
  };
}

async function startSshServer(address = "127.0.0.1", wrapper: string[] = []): Promise<SshServer> {
  const directory = temporaryDirectory();
  const port = await freePort();
  sh(
    `cd "$1"; ssh-keygen -q -t ed25519 -N "" -f host; ssh-keygen -q -t ed25519 -N "" -f key; mkdir -p /run/sshd`,
    directory,
  );
  writeFileSync(
    join(directory, "config"),
    [
      `Port ${port}`,
      `ListenAddress ${address}`,
      `HostKey ${directory}/host`,
      `AuthorizedKeysFile ${directory}/key.pub ${directory}/guarded`,
      "StrictModes no",
      "PermitRootLogin yes",
      "UsePAM no",
      "MaxStartups 1000",
      "MaxSessions 100",
      "PidFile none",
    ].join("\n"),
  );
  const [program = "", ...words] = [
    ...wrapper,
    "/usr/sbin/sshd",
    "-D",
    "-f",
    join(directory, "config"),
  ];
  daemon(program, words);
  await waitFor("sshd", () => answers(port, address));
  writeFileSync(
    join(directory, "known"),
    `[${address}]:${port} ${readFileSync(join(directory, "host.pub"), "utf8")}`,
  );
  // More root logins, with other shells: private copies of the user database stand over the real ones.
  for (const file of ["passwd", "shadow"]) {
    sh(`cp "/etc/$2" "$1/$2"; mount --bind "$1/$2" "/etc/$2"`, directory, file);
    cleanups.push(() => sh(`umount "/etc/$1"`, file));
  }
  // What this machine's root has bash do at a login is nothing for tests, which kill logins at any moment.
  const home = join(directory, "home-root");
  mkdirSync(home);
  writeFileSync(
    join(directory, "passwd"),
    readFileSync(join(directory, "passwd"), "utf8").replace(
      /^(root(?::[^:\n]*){4}):[^:\n]*:/m,
      `$1:${home}:`,
    ),
  );
  const optionsOf = (key: string) =>
    [
      `IdentityFile=${directory}/${key}`,
      "IdentitiesOnly=yes",
      `UserKnownHostsFile=${directory}/known`,
    ].flatMap((option) => ["--ssh-opt", option]);
  return {
    options: optionsOf("key"),
    guarded(...args) {
      const key = `key-${Math.random().toString(36).slice(2)}`;
      const command = [join(ROOT, "dist/btrfs-backup"), "guard", ...args].join(" ");
      sh(
        `cd "$1"; ssh-keygen -q -t ed25519 -N "" -f "$2"; echo "command=\\"$3\\",restrict $(cat "$2.pub")" >>guarded`,
        directory,
        key,
        command,
      );
      return optionsOf(key);
    },
    url: (path, user) => `ssh://${user === undefined ? "" : `${user}@`}${address}:${port}${path}`,
    user(name, shell, uid = 0) {
      const home = join(directory, `home-${uid}`);
      sh(`mkdir -p "$1"; chown "$2" "$1"`, home, String(uid));
      // By the copies' own paths: once they are unmounted, the names in /etc would be those of the real ones.
      for (const [file, line] of [
        ["passwd", `${name}:x:${uid}:${uid}::${home}:${shell}`],
        ["shadow", `${name}:*:19000::::::`],
      ] as const) {
        const copy = join(directory, file);
        const others = readFileSync(copy, "utf8")
          .trimEnd()
          .split("\n")
          .filter((other) => !other.startsWith(`${name}:`));
        writeFileSync(copy, `${[...others, line].join("\n")}\n`); // behind root, whose name ssh takes
      }
    },
  };
}

/** The login shells that a backup server may have, by name. */
export function loginShells(): Record<string, string> {
  const ash = join(temporaryDirectory(), "ash"); // busybox goes by the name that it is called
  sh(`ln -s "$(command -v busybox)" "$1"`, ash);
  return { bash: "/bin/bash", dash: "/bin/dash", ash, fish: "/usr/bin/fish", tcsh: "/bin/tcsh" };
}

let s3: Promise<{ endpoint: string; directory: string }> | null = null;
async function startS3Server(): Promise<{ endpoint: string; directory: string }> {
  const directory = temporaryDirectory();
  const port = await freePort();
  daemon("node", [
    join(import.meta.dir, "s3server.cjs"),
    "--directory",
    directory,
    "--address",
    "127.0.0.1",
    "--port",
    String(port),
    "--silent",
  ]);
  await waitFor("the S3 server", () => answers(port));
  return { endpoint: `http://127.0.0.1:${port}`, directory };
}

/** An empty bucket of one S3 server for all tests of a process, and the environment in which `aws` and others find it. */
export async function s3Server(
  bucket: string,
): Promise<{ endpoint: string; env: Record<string, string> }> {
  const { endpoint, directory } = await (s3 ??= startS3Server());
  rmSync(join(directory, bucket), { recursive: true, force: true });
  mkdirSync(join(directory, bucket));
  const env = {
    AWS_ACCESS_KEY_ID: "S3RVER",
    AWS_SECRET_ACCESS_KEY: "S3RVER",
    AWS_DEFAULT_REGION: "us-east-1",
    AWS_ENDPOINT_URL: endpoint,
    PATH: `/usr/bin:${process.env["PATH"]}`,
  };
  return { endpoint, env };
}

let buckets = 0;
export type Remote = {
  readonly url: (path: string) => string;
  readonly env: Record<string, string>;
  readonly rclone: (script: string, ...args: string[]) => string;
};

/** A new bucket, as a remote of rclone; `rclone` runs a script that can use it as $S. */
export async function s3Remote(): Promise<Remote> {
  const bucket = `bucket-${++buckets}`;
  const { endpoint, env: aws } = await s3Server(bucket);
  const config = {
    TYPE: "s3",
    PROVIDER: "Other",
    ENV_AUTH: "true",
    ENDPOINT: endpoint,
    FORCE_PATH_STYLE: "true",
  };
  const env = {
    ...aws,
    RCLONE_CONFIG: "/dev/null",
    ...Object.fromEntries(
      Object.entries(config).map(([name, value]) => [`RCLONE_CONFIG_STORE_${name}`, value]),
    ),
  };
  const settings = Object.entries({ ...env, S: `store:${bucket}`, TCELL_MINIMIZE: "1" })
    .map(([name, value]) => `export ${name}='${value}'; `)
    .join("");
  return {
    env,
    url: (path) => `rclone://store:${bucket}/${path}`,
    rclone: (script, ...args) => sh(settings + script, ...args),
  };
}

/** A throw-away gpg key without a passphrase. */
export function gpgKey(): { env: Record<string, string>; recipient: string } {
  const home = mkdtempSync("/tmp/gpg-"); // its agent's socket needs a short path
  cleanups.push(() => sh(`GNUPGHOME="$1" gpgconf --kill all; rm -rf "$1"`, home));
  const recipient = "backup@example.org";
  sh(
    `GNUPGHOME="$1" gpg --batch --quiet --passphrase "" --quick-generate-key "$2" future-default default never`,
    home,
    recipient,
  );
  return { env: { GNUPGHOME: home }, recipient };
}

const filled = new Map<number, string>();
/** A tree with all that a send stream carries. It is made once, and unpacked then: that is a process, and not sixty. */
export function fill(directory: string, seed = 1): void {
  const packed = filled.get(seed);
  if (packed !== undefined)
    return void sh(`tar --xattrs --xattrs-include='*' --acls -C "$1" -xpf "$2"`, directory, packed);
  fillAnew(directory, seed);
  const archive = join(temporaryDirectory(), "filled.tar");
  sh(
    `tar --format=posix --sparse --xattrs --xattrs-include='*' --acls -C "$1" -cf "$2" plain empty 'odd names'`,
    directory,
    archive,
  );
  filled.set(seed, archive);
}

function fillAnew(directory: string, seed: number): void {
  const random = generator(seed);
  sh(
    `cd "$1"; mkdir -p plain/deep/er empty 'odd names'; chmod 1777 empty
    for i in $(seq 20); do head -c $((i * 500)) /dev/urandom >"plain/$i"; done; head -c 300000 /dev/urandom >plain/deep/er/large
    echo a >'odd names/ space '; echo b >'odd names/quote'\\''"$(x);\`'; echo c >$'odd names/line\\nbreak'; echo d >'odd names/-dash'; echo e >'odd names/ü ☃'; echo f >'odd names/back\\slash!'
    chmod 4755 plain/1; chmod 0 plain/2; chown 1234:4321 plain/3; touch -d '2001-02-03 04:05:06.123456789' plain/4
    ln plain/5 'plain/deep/hard link'; ln -s ../nowhere plain/symlink; setfattr -n user.note -v "value $2" plain/6; setfacl -m u:1234:rw plain/7; setfacl -d -m g:4321:r plain/deep
    truncate -s 10M plain/sparse; echo end >>plain/sparse; mkfifo plain/fifo; mknod plain/null c 1 3; mknod plain/block b 7 99; setcap cap_net_raw+ep plain/8 2>/dev/null || :`,
    directory,
    String(random()),
  );
}

/** Changes a filled tree in random ways. */
export function change(directory: string, random: () => number): void {
  const files = sh(`cd "$1"; find plain -type f -print`, directory).split("\n");
  const pick = () => files[Math.floor(random() * files.length)] ?? "plain/1";
  const made = Math.floor(random() * 1e9).toString(36);
  const changes = (tag: string): [string, ...string[]][] => [
    [`head -c 5000 /dev/urandom >>"$2"`, pick()],
    [`truncate -s 100 "$2"`, pick()],
    [`mv -T "$2" "plain/renamed-$3"`, pick(), tag],
    [`ln "$2" "plain/linked-$3"`, pick(), tag],
    [`rm -f "$2"`, pick()],
    [`setfattr -n user.tag -v "$3" "$2"`, pick(), tag],
    [`cp --reflink=always "$2" "plain/copy-$3"`, pick(), tag],
    [`printf x | dd of="$2" bs=1 seek=10 conv=notrunc 2>/dev/null`, pick()],
    [`mkdir "plain/dir-$3"; head -c 9000 /dev/urandom >"plain/dir-$3/new"`, pick(), tag],
    [`chmod 640 "$2"; touch -d @$((RANDOM * 1000)).5 "$2"`, pick()],
  ];
  for (let i = 0; i < 4; i++) {
    const all = changes(`${made}-${i}`);
    const [script, ...args] = all[Math.floor(random() * all.length)] as [string, ...string[]];
    sh(`cd "$1"; [ ! -e "$2" ] || { ${script}; }`, directory, ...args);
  }
}

// Nested subvolumes are empty directories with inode 2 in a snapshot, and are not received at all.
// The top directory's own mtime is not compared: files are born there under another name while they
// are received, and an incremental stream does not say what its mtime was (seen with kernel 6.18).
// With a second parameter, what has that path is left out.
const TAR = `cd "$1"; out="\${2:-/}"; stat -c '%a %u:%g' .; getfacl -npE . 2>/dev/null; getfattr -d -m - . 2>/dev/null; find . -mindepth 1 \\( -inum 2 -prune -o -path "$out" -prune -o -print0 \\) | LC_ALL=C sort -z | tar --format=posix --pax-option=delete=atime,delete=ctime --numeric-owner --xattrs --xattrs-include='*' --acls --no-recursion --null -T - -cf - 2>/dev/null`;

/** One digest of everything in a tree. */
export const treeDigest = (path: string) => sh(`{ ${TAR}; } | cksum`, path);

/** One digest of a subvolume without its snapshot folder: what a restore must bring back. */
export const contentsDigest = (path: string) => sh(`{ ${TAR}; } | cksum`, path, "./snapshot");

/**
 * Snapshots, one an hour, as many as asked for, and backups of them in some folders, made by nothing but ioctls (linux/btrfs.h): sending so many would
 * take hours. FOLDER.base gets the UUID of a snapshot as its received UUID, and what is taken of it has that too.
 */
const HISTORY = `source=$1 snapshots=$2 count=$3; shift 3
  snapshot='sub dir { open(my $d, "<", $_[0]) or die "$_[0]: $!"; $d }
    sub snapshot { ioctl($_[0], 0x50009417, pack("q Q Q x32 a4040", fileno($_[1]), 0, 2, $_[2])) or die "snapshot: $!" }' # SNAP_CREATE_V2, read-only
  perl -MPOSIX -e "$snapshot"'
    my ($source, $snapshots, $count) = @ARGV; my ($s, $in) = (dir($source), dir($snapshots)); $| = 1;
    for my $i (1 .. $count) {
      my $name = strftime("%Y%m%d-%H%M%S", gmtime(1262304000 + 3600 * $i));
      snapshot($in, $s, $name);
      my $info = chr(0) x 504; ioctl(dir("$snapshots/$name"), 0x81F8943C, $info) or die "info: $!"; # GET_SUBVOL_INFO
      print "$name ", unpack("H32", substr($info, 296)), "\\n";
    }' "$source" "$snapshots" "$count" | perl -e "$snapshot"'
    my @places = map { [dir("$_.base"), dir($_)] } @ARGV;
    while (my ($name, $uuid) = split(" ", <STDIN> // "")) {
      for my $place (@places) {
        my ($b, $in) = @$place;
        my $received = pack("H32 x184", $uuid); ioctl($b, 0xC0C89425, $received) or die "received: $!"; # SET_RECEIVED_SUBVOL
        snapshot($in, $b, $name);
      }
    }' "$@"`;

/** Makes so many snapshots of a source, and backups of them in folders that have one backup of it. */
export function history(
  source: string,
  snapshots: string,
  count: number,
  places: readonly string[],
): void {
  for (const folder of places)
    sh(
      `base="$(ls -d "$1"/2* | head -n 1)"; [ -d "$1.base" ] || btrfs -q subvolume snapshot "$base" "$1.base" >/dev/null`,
      folder,
    );
  sh(HISTORY, source, snapshots, String(count), ...places);
}

/** Streams as `raw://` has them: as many as asked for, which are the one in a folder under other names. */
const MANY_STREAMS = `cd "$1"; perl -MPOSIX -e '
  my ($one) = grep { /full[.]btrfs$/ } sort(glob("2*")); open(my $sums, "<", "$one.sha256"); my ($sum) = split(" ", <$sums>);
  for my $i (1 .. $ARGV[0]) {
    my ($name, $uuid) = (strftime("%Y%m%d-%H%M%S", gmtime(1262304000 + 3600 * $i)), sprintf("%08x-0000-4000-8000-000000000000", $i));
    (my $new = $one) =~ s/^[0-9]{8}-[0-9]{6}(.*?_[0-9a-f-]{36}_)[0-9a-f-]{36}/$name$1$uuid/;
    next if -e $new;
    link($one, $new) or die "$new: $!";
    open(my $file, ">", "$new.sha256"); print $file "$sum  $new\\n"; close $file;
  }' "$2"; sync`;

/** Adds streams to a folder of `raw://` until there are so many: the full one that is there, under other names. */
export const manyStreams = (folder: string, count: number) =>
  void sh(MANY_STREAMS, folder, String(count));

/** Damages a received subvolume by a script that runs in it, so that it still looks as it was received. */
export function damage(path: string, script: string): void {
  const received = sh(
    `btrfs subvolume show "$1" | sed -n 's/.*Received UUID:[[:space:]]*//p'`,
    path,
  );
  sh(`btrfs property set -f -ts "$1" ro false; cd "$1"; ${script}`, path);
  // BTRFS_IOC_SET_RECEIVED_SUBVOL of linux/btrfs.h: 16 bytes of UUID in a struct of 200.
  sh(
    `perl -e 'open(my $d, "<", $ARGV[0]) or die; my $a = pack("H32", $ARGV[1]) . chr(0) x 184; ioctl($d, 0xC0C89425, $a) or die "$!"' "$1" "$2"; btrfs property set -ts "$1" ro true`,
    path,
    received.replaceAll("-", ""),
  );
}

/** Fails with what differs, unless two trees are the same in everything. */
export function expectSameTree(a: string, b: string): void {
  if (treeDigest(a) === treeDigest(b)) return;
  const listing = (path: string) =>
    sh(
      `cd "$1"; find . -mindepth 1 \\( -inum 2 -prune -o -type d -printf '%p %y %m %U:%G %T@\\n' -o -printf '%p %y %m %U:%G %n %s %T@ %l\\n' \\) | LC_ALL=C sort`,
      path,
    ).split("\n");
  const [left, right] = [listing(a), listing(b)];
  expect({ in: a, lines: left.filter((line) => !right.includes(line)) }).toEqual({
    in: b,
    lines: right.filter((line) => !left.includes(line)),
  } as never);
  throw new Error(`${a} and ${b} differ in contents or attributes`);
}

/** Every backup in a folder is complete, and the same as the snapshot it was received from where that still is. */
export function expectSound(backups: string, snapshots: string, prefix = ""): void {
  const sources = [...subvolumes(snapshots)];
  for (const [name, backup] of subvolumes(backups)) {
    if (!snapshotNames(backups, prefix).includes(name)) continue;
    expect({ name, readonly: backup.readonly, received: backup.receivedUuid !== null }).toEqual({
      name,
      readonly: true,
      received: true,
    });
    const source = sources.find(([, { uuid }]) => uuid === backup.receivedUuid);
    if (source) expectSameTree(join(snapshots, source[0]), join(backups, name));
  }
}

/** A source with a filled subvolume, and a destination, each on a filesystem of its own. */
export function pair({ size = "1G" } = {}): {
  source: string;
  snapshots: string;
  destination: string;
  a: Filesystem;
  b: Filesystem;
} {
  const [a, b] = [filesystem({ size }), filesystem({ size })];
  const source = subvolume(join(a.path, "home"));
  fill(source);
  return { source, snapshots: join(source, "snapshot"), destination: join(b.path, "backup"), a, b };
}

/** The lines of a log before the summary, which says errors once more, and shorter. */
export const logged = (stderr: string) =>
  stderr.split(/\[info\] (?:Done|Nothing was changed): /)[0] ?? "";

/** The transfers that a run with --json tells of. */
export const transfers = (result: Parameters<typeof events>[0]) =>
  events(result).filter(({ event }) => event === "transfer");

/** An environment in which the programs of a directory are found first. */
export const pathWith = (directory: string) => ({
  PATH: `${directory}:${process.env["PATH"]}`,
});

/** Locks a file, as another run would; returns how to unlock it. */
export async function holdLock(file: string): Promise<() => Promise<void>> {
  const holder = Bun.spawn(["flock", "--no-fork", file, "sleep", "600"]);
  const isHeld = () => sh(`flock -n "$1" true && echo free || echo held`, file) === "held";
  await waitFor("the lock", isHeld);
  return async () => {
    holder.kill("SIGKILL");
    await holder.exited;
  };
}
