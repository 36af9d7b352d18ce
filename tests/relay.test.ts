// What all bytes pass: the relay, alone and in its pipelines. It changes nothing, waits for nobody, and
// lets no stream through that another host or a store forged.

import { describe, expect, test } from "bun:test";
import { createHash } from "node:crypto";
import { spawn, spawnSync } from "node:child_process";
import {
  closeSync,
  existsSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { streamCheck } from "../btrfs-backup.ts";
import { descendants, isAlive, signal } from "./support/processes.ts";
import {
  attribute,
  command,
  forgeries,
  linkForgeries,
  stream,
  streamOf,
} from "./support/stream.ts";
import {
  change,
  events,
  expectRun,
  expectSound,
  filesystem,
  gpgKey,
  type How,
  pair,
  PROGRAM,
  type Result,
  ROOT,
  run,
  s3Remote,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  subvolumes,
  temporaryDirectory,
  treeDigest,
  waitFor,
} from "./support/rig.ts";
import { generator, seeded, soak } from "./support/random.ts";
import { numberedUuid } from "./support/names.ts";

const NAME = "20300101-000000";
const P = attribute.path;
const begin = command("subvol", P(NAME), attribute.uuid(numberedUuid(5)), attribute.ctransid(1));
const end = command("end");
const make = {
  file: (path: string) => command("mkfile", P(path), attribute.ino(300)),
  directory: (path: string) => command("mkdir", P(path), attribute.ino(301)),
  link: (path: string, to = "/x") =>
    command("symlink", P(path), attribute.ino(302), attribute.pathLink(to)),
  name: (path: string, of: string) => command("link", P(path), attribute.pathLink(of)),
  node: (path: string, mode: number) =>
    command("mknod", P(path), attribute.ino(303), attribute.rdev(0x103), attribute.mode(mode)),
  rename: (path: string, to: string) => command("rename", P(path), attribute.pathTo(to)),
  unlink: (path: string) => command("unlink", P(path)),
  rmdir: (path: string) => command("rmdir", P(path)),
  write: (path: string, data = Buffer.from("evil")) =>
    command("write", P(path), attribute.offset(0), attribute.data(data.toString("latin1"))),
  clone: (path: string, from: string, of = numberedUuid(5)) =>
    command(
      "clone",
      attribute.offset(0),
      attribute.cloneLength(4096),
      P(path),
      attribute.cloneUuid(of),
      attribute.cloneCtransid(1),
      attribute.clonePath(from),
      attribute.cloneOffset(0),
    ),
};
const check = { name: NAME, uuid: numberedUuid(5), parent: null, alone: false };

describe.each<How>(["binary", "bun", "deno", "one file by node"])("the relay, by %s,", (how) => {
  /** Starts it between files. `script`: how it is run, as "$@". */
  function relay(options: object, script = `exec "$@" <"$0/in" >"$0/out" 2>"$0/err"`) {
    const directory = temporaryDirectory();
    const [input, output] = ["in", "out"].map((name) => join(directory, name)) as [string, string];
    spawnSync("mkfifo", [input, output]);
    const tell = join(directory, "told");
    const words = [...PROGRAM[how], "--relay", JSON.stringify({ tell, ...options })];
    const child = spawn("bash", ["-c", script, directory, ...words], { stdio: "ignore" });
    type Ended = { status: number | null; signal: string | null };
    const ended = new Promise<Ended>((done) =>
      child.on("close", (status, signal) => done({ status, signal })),
    );
    return {
      directory,
      input,
      output,
      child,
      pid: child.pid as number,
      ended,
      told: () => JSON.parse(readFileSync(tell, "utf8")),
    };
  }
  /** Waits until its main thread sleeps there in the kernel. */
  const sleepsIn = (pid: number, where: RegExp) =>
    waitFor(`${where} of ${pid}`, () => where.test(readFileSync(`/proc/${pid}/wchan`, "utf8")));
  /** A number that a file of /proc says of it, by its label. */
  const figure = (pid: number, file: string, label: string) =>
    Number(
      new RegExp(`^${label}:\\s+(\\d+)`, "m").exec(
        readFileSync(`/proc/${pid}/${file}`, "utf8"),
      )?.[1],
    );
  const passed = (options: object, input: Buffer) => {
    const tell = join(temporaryDirectory(), "told");
    const [program = "", ...words] = PROGRAM[how];
    const all = [...words, "--relay", JSON.stringify({ tell, ...options })];
    const { status, stdout, stderr } = spawnSync(program, all, { input, maxBuffer: 2 ** 30 });
    return {
      status,
      stdout,
      stderr: stderr.toString(),
      told: existsSync(tell) ? JSON.parse(readFileSync(tell, "utf8")) : null,
    };
  };

  test("is ended at once by TERM, INT and HUP, while it reads, writes or waits for its rate", async () => {
    const signals = ["SIGTERM", "SIGINT", "SIGHUP"] as const;
    const cases = signals.flatMap((signal) =>
      (["reads", "writes", "waits"] as const).map((what) => [signal, what] as const),
    );
    const found = await Promise.all(
      cases.map(async ([signal, what]) => {
        const options = { reads: { check }, writes: {}, waits: { rate: 1 } }[what];
        const it = relay(
          options,
          `exec "$@" <${what === "reads" ? `"$0/in"` : "/dev/zero"} >"$0/out" 2>"$0/err"`,
        );
        const open = [it.input, it.output].map((path) => openSync(path, "r+"));
        try {
          // For its second byte it would wait for an hour.
          if (what === "waits")
            await waitFor("the first bytes", () => figure(it.pid, "io", "wchar") >= 4096);
          await sleepsIn(
            it.pid,
            { reads: /pipe_read/, writes: /pipe_write/, waits: /futex/ }[what],
          );
          it.child.kill(signal);
          return [signal, what, (await Promise.race([it.ended, Bun.sleep(20_000)]))?.signal];
        } finally {
          it.child.kill("SIGKILL");
          for (const descriptor of open) closeSync(descriptor);
        }
      }),
    );
    expect(found).toEqual(cases.map(([signal, what]) => [signal, what, signal]));
  });

  test("changes no byte, and tells how many there were and their SHA-256", () => {
    const random = generator(7);
    for (const size of [0, 1, 4096, 2 ** 20 - 1, 2 ** 20, 2 ** 20 + 1, 5_000_003]) {
      const bytes = Buffer.from(
        Uint32Array.from({ length: Math.ceil(size / 4) }, () => random() * 2 ** 32).buffer,
        0,
        size,
      );
      const { status, stdout, told } = passed({ sum: true }, bytes);
      const sum = createHash("sha256").update(bytes).digest("hex");
      expect([status, stdout.equals(bytes), told]).toEqual([0, true, { bytes: size, sum }]);
    }
    const good = stream(
      begin,
      make.file("x"),
      ...Array.from({ length: 40 }, () => make.write("x", Buffer.alloc(48 * 1024, 7))),
      end,
    );
    const { status, stdout, told } = passed({ sum: true, check }, good);
    expect([status, stdout.equals(good), told.bytes, told.sum]).toEqual([
      0,
      true,
      good.length,
      createHash("sha256").update(good).digest("hex"),
    ]);
  });

  test("lets no refused stream end, and says why", () => {
    const good = stream(begin, make.file("x"), make.write("x"), end);
    const forged = Object.values(forgeries)
      .map((forge) => forge(good))
      .filter((bytes) => !bytes.equals(good));
    const bad = [
      ...forged,
      Buffer.alloc(0),
      Buffer.from("nothing of the kind"),
      stream(begin, begin, end),
    ];
    for (const bytes of how === "binary" ? bad : bad.slice(-4)) {
      const { status, stdout, stderr, told } = passed({ check, sum: true }, bytes);
      expect([status, stdout.includes(end), stdout.includes("escaped"), told]).toEqual([
        1,
        false,
        false,
        null,
      ]);
      expect(stderr).toMatch(/^the stream is refused: [^\n]+\n$/);
    }
  });

  /** What it took of memory at most, in MB, for all that a script writes; its output ends in `last`. */
  async function peak(
    options: object,
    total: number,
    script: string,
    files: Record<string, Buffer>,
  ) {
    const it = relay(options, `exec "$@" <"$0/in" >"$0/out" 2>"$0/err"`);
    for (const [name, bytes] of Object.entries(files))
      writeFileSync(join(it.directory, name), bytes);
    const sink = spawn("bash", ["-c", `wc -c <"$0/out" >"$0/length"`, it.directory], {
      stdio: "ignore",
    });
    const written = new Promise((done) => sink.on("close", done));
    const input = openSync(it.input, "r+");
    const writer = spawn("bash", ["-c", `cd "$0"; ${script}`, it.directory], {
      stdio: ["ignore", input, "inherit"],
    });
    try {
      await new Promise((done) => writer.on("close", done));
      await waitFor("all to be read", () => figure(it.pid, "io", "rchar") >= total, 300);
      await sleepsIn(it.pid, /pipe_read/);
      const reads = figure(it.pid, "io", "syscr");
      const memory = figure(it.pid, "status", "VmHWM") / 1000;
      closeSync(input);
      expect(await it.ended).toEqual({ status: 0, signal: null });
      await written;
      const told = it.told();
      expect(Number(readFileSync(join(it.directory, "length"), "utf8"))).toBe(told.bytes);
      return { memory, told, reads };
    } finally {
      for (const one of [it.child, sink, writer]) one.kill("SIGKILL");
    }
  }
  const repeated = (times: number) =>
    `cat begin; perl -e 'local $/; open F, "block"; $b = <F>; for (1 .. ${times}) { print $b }'; cat end`;
  const parts = (block: Buffer) => ({ begin: stream(begin, make.file("x")), block, end });

  test("takes no more memory for much than for little", async () => {
    const block = Buffer.concat(
      Array.from({ length: 32 }, () => make.write("x", Buffer.alloc(32_000, 1))),
    );
    const tiny = Buffer.concat(
      Array.from({ length: 1000 }, () => command("chmod", P("x"), attribute.mode(0o644))),
    );
    const all = { sum: true, check: { ...check, alone: true } };
    const of = (bytes: number, one: Buffer) =>
      peak(all, bytes, repeated(Math.ceil(bytes / one.length)), parts(one));
    const little = await of(10 * 2 ** 20, block);
    const much = await of(2 * 2 ** 30, block);
    const many = await of(1000 * tiny.length, tiny);
    expect(much.told.bytes).toBeGreaterThan(2 * 2 ** 30);
    expect(much.memory - little.memory).toBeLessThan(30);
    expect(many.memory - little.memory).toBeLessThan(30);
  });

  test("takes bytes that come one by one", async () => {
    const writes = Array.from({ length: 4 }, () => make.write("x", Buffer.alloc(49_000, 1)));
    const good = stream(begin, make.file("x"), ...writes, end);
    // O_DIRECT of fcntl.h makes each write a packet, which is read alone.
    const single = `perl -e 'fcntl(STDOUT, 4, 1 | 0x4000) or die $!; local $/; open F, "all"; $b = <F>;
      syswrite STDOUT, $b, 1, $_ for 0 .. length($b) - 1'`;
    for (const options of [{ sum: true }, { sum: true, check }]) {
      const { told, memory, reads } = await peak(options, good.length, single, { all: good });
      expect(told).toMatchObject({
        bytes: good.length,
        sum: createHash("sha256").update(good).digest("hex"),
      });
      expect(reads).toBeGreaterThan(good.length);
      expect(memory).toBeLessThan(300);
    }
  });
});

describe("without the fence", () => {
  /** Why a stream is refused; null if it is not. */
  function verdict(bytes: Buffer, alone = true, size = bytes.length): string | null {
    const { pass, finish } = streamCheck(() => {}, alone);
    const room = Buffer.alloc(bytes.length);
    try {
      let [at, have] = [0, 0];
      for (let next = 0; next < bytes.length; next += size) {
        const part = bytes.subarray(next, next + size);
        part.copy(room, have);
        have += part.length;
        at = pass(room, at, have);
      }
      finish();
      return null;
    } catch (error) {
      return (error as Error).message;
    }
  }
  const of = (...commands: Buffer[]) => stream(begin, ...commands, end);
  const zipped = (path: string) =>
    command(
      "encoded_write",
      P(path),
      attribute.offset(0),
      attribute.unencodedFileLength(4096),
      attribute.unencodedLength(4096),
      attribute.unencodedOffset(0),
      attribute.compression(1),
      attribute.data("x"),
    );

  /** Commands that follow a link of this name, in btrfs receive. */
  const following: Record<string, (path: string) => Buffer> = {
    write: (path) => make.write(path),
    truncate: (path) => command("truncate", P(path), attribute.size(0)),
    chmod: (path) => command("chmod", P(path), attribute.mode(0o777)),
    "clone to": (path) => make.clone(path, "file"),
    "clone from": (path) => make.clone("file", path),
    encoded: zipped,
    mkfile: make.file, // it is creat(2)
  };
  const entering: Record<string, (path: string) => Buffer> = {
    ...following,
    mkdir: make.directory,
    symlink: (path) => make.link(path),
    mkfifo: (path) =>
      command("mkfifo", P(path), attribute.ino(1), attribute.rdev(0), attribute.mode(0o10600)),
    mksock: (path) =>
      command(7, P(path), attribute.ino(1), attribute.rdev(0), attribute.mode(0o140600)),
    mknod: (path) => make.node(path, 0o100600),
    "rename from": (path) => make.rename(path, "elsewhere"),
    "rename to": (path) => make.rename("file", path),
    "link to": (path) => make.name(path, "file"),
    "link from": (path) => make.name("elsewhere", path),
    unlink: make.unlink,
    rmdir: make.rmdir,
    chown: (path) => command("chown", P(path), attribute.uid(0), attribute.gid(0)),
    utimes: (path) =>
      command("utimes", P(path), attribute.atime(), attribute.mtime(), attribute.ctime()),
  };
  const commandOf = (what: string, path: string) =>
    (entering[what] as (path: string) => Buffer)(path);
  /** How a link can come to stand at a path. */
  const ways: Record<string, [string, ...Buffer[]]> = {
    "made there": ["l", make.link("l")],
    "made in a folder": ["d/l", make.directory("d"), make.link("d/l")],
    renamed: ["m", make.link("l"), make.rename("l", "m")],
    "renamed twice": ["n", make.link("l"), make.rename("l", "m"), make.rename("m", "n")],
    "renamed to its own name": ["l", make.link("l"), make.rename("l", "l")],
    "renamed over a file": ["f", make.link("l"), make.file("f"), make.rename("l", "f")],
    "a second name": ["m", make.link("l"), make.name("m", "l")],
    "a second name whose first is gone": [
      "m",
      make.link("l"),
      make.name("m", "l"),
      make.unlink("l"),
    ],
    "a third name": ["n", make.link("l"), make.name("m", "l"), make.name("n", "m")],
    "in a folder that is renamed": [
      "e/l",
      make.directory("d"),
      make.link("d/l"),
      make.rename("d", "e"),
    ],
    "in a folder in one that is renamed": [
      "e/s/l",
      make.directory("d"),
      make.directory("d/s"),
      make.link("d/s/l"),
      make.rename("d", "e"),
    ],
    "moved into a folder that is renamed": [
      "e/m",
      make.link("l"),
      make.directory("d"),
      make.rename("l", "d/m"),
      make.rename("d", "e"),
    ],
    "made again": [
      "l",
      make.link("l"),
      make.unlink("l"),
      make.file("l"),
      make.unlink("l"),
      make.link("l"),
    ],
    "in the place of a file that was written": [
      "l",
      make.file("l"),
      make.write("l"),
      make.rename("l", "m"),
      make.link("l"),
    ],
    "renamed to another of its names, which does nothing": [
      "l",
      make.link("l"),
      make.name("m", "l"),
      make.rename("l", "m"),
    ],
    "in a folder, renamed to another of its names": [
      "d/l",
      make.directory("d"),
      make.link("d/l"),
      make.name("m", "d/l"),
      make.rename("d/l", "m"),
    ],
    "with a name in latin1": ["\xff\xfe", make.link("\xff\xfe")],
    "whose name begins another's": [
      "d",
      make.directory("dd"),
      make.link("d"),
      make.rename("dd", "ddd"),
    ],
  };
  for (const [way, [path, ...before]] of Object.entries(ways))
    test(`no command goes through a link: ${way}`, () => {
      const passing = [
        ...Object.entries(entering).map(
          ([what, at]) =>
            [`${what} below`, of(make.file("file"), ...before, at(`${path}/x`))] as const,
        ),
        ...Object.entries(entering).map(
          ([what, at]) =>
            [`${what} far below`, of(make.file("file"), ...before, at(`${path}/x/y/z`))] as const,
        ),
        ...Object.entries(following).map(
          ([what, at]) => [what, of(make.file("file"), ...before, at(path))] as const,
        ),
      ].filter(([, bytes]) => verdict(bytes) === null);
      expect(passing.map(([what]) => what)).toEqual([]);
    });

  test("what is no link any more, or never was, is used like all else", () => {
    const gone: Record<string, [string, ...Buffer[]]> = {
      "a link that was removed": ["l", make.link("l"), make.unlink("l"), make.file("l")],
      "a link that was renamed": ["l", make.link("l"), make.rename("l", "m"), make.file("l")],
      "a link that a file was renamed to": [
        "l",
        make.link("l"),
        make.file("f"),
        make.rename("f", "l"),
      ],
      "a link in a folder that was renamed": [
        "d/l",
        make.directory("d"),
        make.link("d/l"),
        make.rename("d", "e"),
        make.directory("d"),
        make.file("d/l"),
      ],
      "a name that begins like a link's": ["ll", make.link("l"), make.file("ll")],
      "a name in a link's folder": ["d/x", make.directory("d"), make.link("d/l"), make.file("d/x")],
      "a name that a link's begins with": [
        "d",
        make.directory("dd"),
        make.link("dd/l"),
        make.file("d"),
      ],
    };
    const refused: string[] = [];
    for (const [what, [path, ...before]] of Object.entries(gone))
      for (const [name, at] of Object.entries({ ...following, mkfile: make.unlink }))
        if (verdict(of(make.file("file"), ...before, at(path))) !== null)
          refused.push(`${what}: ${name}`);
    // The link itself may have an owner, times and attributes, be moved, and be removed.
    for (const what of ["chown", "utimes", "unlink", "rename from", "link from"])
      if (verdict(of(make.link("l"), commandOf(what, "l"))) !== null) refused.push(what);
    expect(refused).toEqual([]);
  });

  test("no device is made; FIFOs, sockets and files are", () => {
    for (const mode of [0o20600, 0o60600, 0o60000, 0o120000 & 0o20000])
      expect(verdict(of(make.node("x", mode)))).toContain("a device");
    for (const mode of [0o10600, 0o140600, 0o100600, 0o600])
      expect(verdict(of(make.node("x", mode)))).toBe(null);
    expect(verdict(of(make.node("x", 0o20600)), false)).toBe(null);
  });

  test("paths out of it, other subvolumes, lying lengths and unknown commands are refused, in pieces of any size", () => {
    const within = [
      "a/..",
      "a/../x",
      "a/../../x",
      ".",
      "./x",
      "a/.",
      "a/./x",
      "a//x",
      "a/",
      "a\0b",
      "\0",
      `${"x/".repeat(2100)}x`,
    ];
    const paths = ["", "/", "/x", "//x", "..", "../x", "../../x", ...within];
    const making = [
      "mkdir",
      "symlink",
      "mkfifo",
      "unlink",
      "rmdir",
      "rename from",
      "rename to",
      "link to",
      "mkfile",
    ];
    const changing = [
      "write",
      "truncate",
      "chmod",
      "clone to",
      "clone from",
      "encoded",
      "chown",
      "utimes",
      "link from",
    ];
    const each = (commands: readonly string[], some: readonly string[]) =>
      some.flatMap((path) =>
        commands.map(
          (what) => [`${what} ${path.slice(0, 20)}`, of(commandOf(what, path))] as const,
        ),
      );
    const good = of(make.file("x"), make.write("x"));
    // These are another's to refuse, who knows what was asked for; or make no difference to a stream in full.
    const others = ["another name", "a name elsewhere", "another UUID", "another parent"];
    const whole = Object.entries(forgeries)
      .filter(([what]) => !others.includes(what))
      .map(([what, forge]) => [what, forge(good)] as const);
    const cut = Array.from(
      { length: good.length },
      (_, length) => [`the first ${length} bytes`, good.subarray(0, length)] as const,
    );
    const codes = [0, 22, 23, 26, 27, 28, 100, 65535].map(
      (code) => [`command ${code}`, of(command(code, P("x")))] as const,
    );
    // The subvolume itself may change.
    const all = [
      ...each(making, paths),
      ...each(changing, paths.slice(1)),
      ...whole,
      ...cut,
      ...codes,
    ];
    for (const alone of [true, false]) {
      const passes = (bytes: Buffer) =>
        verdict(bytes, alone) === null ||
        (bytes.length < 10_000 && verdict(bytes, alone, 1) === null);
      expect(all.filter(([, bytes]) => passes(bytes)).map(([what]) => what)).toEqual([]);
    }
    expect([verdict(good), verdict(good, true, 1), verdict(good, false, 3)]).toEqual([
      null,
      null,
      null,
    ]);
  });

  test("many links, each of which gets its name by a rename, as btrfs send makes them, take no time", () => {
    // If each rename looked at all links, these would take an hour.
    const made = Array.from({ length: 200_000 }, (_, i) => [
      make.link(`o${i}-7-0`),
      make.rename(`o${i}-7-0`, `d/link ${i}`),
    ]);
    expect(verdict(Buffer.concat([stream(begin), make.directory("d"), ...made.flat(), end]))).toBe(
      null,
    );
  });

  test("what btrfs send makes passes, but for devices", () => {
    const { source } = pair();
    const random = seeded();
    const links = (round: number) =>
      sh(
        `cd "$1"; mkdir -p "round $2/in"; ln -s /etc "round $2/link"; ln -s ../.. "round $2/in/up"; mkfifo "round $2/fifo"
      ln "round $2/link" "round $2/in/second"
      for one in plain/symlink swap; do
        if [ -L $one ]; then rm $one; mkdir $one; echo x >$one/file; else rm -rf $one; ln -s "round $2" $one; fi
      done
      if [ -e first ]; then mv first first.old; mv second first; mv first.old second
      else ln -s /etc first; mkdir second; echo x >second/file; fi`,
        source,
        String(round),
      );
    const found: unknown[] = [];
    let previous: string | null = null;
    for (let i = 0; i < soak(4); i++) {
      links(i);
      if (i > 0) change(source, random);
      const name = `2026010${i + 1}-000000`;
      snapshotAs(source, name);
      const now = join(source, "snapshot", name);
      for (const how of [
        ["--proto", "1"],
        ["--proto", "2"],
        ["--proto", "2", "--compressed-data"],
      ])
        for (const parent of previous === null ? [null] : [null, previous]) {
          const bytes = streamOf(now, parent, ...how);
          const why = verdict(bytes);
          const isFull = parent === null;
          if (
            verdict(bytes, false) !== null ||
            (i === 0 ? !why?.includes("a device") : why !== null)
          )
            found.push([i, isFull, how, why]);
        }
      previous = now;
      if (i === 0) sh(`cd "$1"; rm plain/null plain/block`, source);
      if (i === 0) previous = null;
    }
    expect(found).toEqual([]);
  });
});

let logins = 0;
/** A login that is honest in all but the streams that it sends: these are what `forgeries` makes of them. */
async function liar(kind: string): Promise<string> {
  const { user } = await sshServer();
  const name = `liar${++logins}`;
  const shell = join(temporaryDirectory(), "shell");
  const script = join(temporaryDirectory(), "forge.ts");
  writeFileSync(
    script,
    `import { forgeries, linkForgeries } from ${JSON.stringify(join(ROOT, "tests/support/stream.ts"))};
    import { spawnSync } from "node:child_process";
    import { readFileSync, writeSync } from "node:fs";
    const through = (command, bytes) => spawnSync(command[0], command.slice(1), { input: bytes, maxBuffer: 2 ** 30 }).stdout;
    const given = readFileSync(0);
    const zipped = given.subarray(0, 4).equals(Buffer.from([0x28, 0xb5, 0x2f, 0xfd]));
    const forged = { ...forgeries, ...linkForgeries }[${JSON.stringify(kind)}](zipped ? through(["zstd", "-qdc"], given) : given);
    const bytes = zipped ? through(["zstd", "-qc"], forged) : forged;
    try { for (let at = 0; at < bytes.length;) at += writeSync(1, bytes, at); } catch {}`,
  );
  const honest = `case $2 in *"btrfs-backup:send'"*) ;; *) exec /bin/sh "$@";; esac`;
  writeFileSync(shell, `#!/bin/bash\n${honest}\n/bin/sh "$@" | ${PROGRAM.bun[0]} ${script}\n`, {
    mode: 0o755,
  });
  user(name, shell);
  return name;
}

/** A small source with two snapshots. */
function source(): { source: string; first: string; second: string } {
  const home = subvolume(join(filesystem().path, "home"));
  const [first, second] = ["20260101-000000", "20260102-000000"];
  sh(`cd "$1"; head -c 300000 /dev/urandom >file; mkdir d; ln -s file d/link`, home);
  snapshotAs(home, first);
  sh(`cd "$1"; head -c 9000 /dev/urandom >>file; mv d e`, home);
  snapshotAs(home, second);
  return { source: home, first, second };
}
/** All that stands in a folder and beside it, but for what the program itself remembers there, and what it keeps to go on from. */
const standing = (path: string) =>
  sh(
    `cd "$1"; find . .. -mindepth 1 -maxdepth 1 ! -name ".btrfs-backup*" ! -name ".*.part" | LC_ALL=C sort -u
  cat ../victim ./victim 2>/dev/null || :`,
    path,
  );
const REFUSED = /the stream is refused: .*\(--trust-stream receives it as it is\)/;
/** What must be so where a forged stream came in. */
const outcome = ({ status, stderr }: Result) => [
  status,
  REFUSED.test(stderr),
  /\n {4}at /.test(stderr),
];
const asPromised = [1, true, false];
/** Which ones make no difference to a stream in full, or one that is a difference. */
const full = Object.keys(forgeries).filter((kind) => kind !== "another parent");

test.concurrent(
  "one of three disks that no longer answers keeps neither the two others nor the run",
  async () => {
    const home = subvolume(join(filesystem().path, "home"));
    sh(`head -c 60M /dev/urandom >"$1/file"`, home);
    snapshotAs(home, "20260101-000000");
    const places = [1, 2, 3].map(() => join(filesystem().path, "backup")) as [
      string,
      string,
      string,
    ];
    const disk = join(places[2], "..");
    const begun = (folder: string) =>
      existsSync(folder) && existsSync(join(folder, "20260101-000000", "file"));
    const running = start([
      "-S",
      "--protocol",
      "1",
      "--rate-limit",
      "10m", // six seconds in which all three are at work
      "--json",
      "--timeout",
      "4",
      home,
      ...places,
    ]);
    let frozen = false;
    try {
      await waitFor("all three to receive", () => places.every(begun));
      sh(`fsfreeze -f "$1"`, disk);
      frozen = true;
      const limit = Bun.sleep(150_000).then(() => null);
      const result = await Promise.race([running.finished, limit]);
      if (result === null) {
        const left = descendants(running.pid).map(
          ({ pid, text }) =>
            `${pid} ${readFileSync(`/proc/${pid}/wchan`, "utf8")} ${text.slice(-300)}`,
        );
        throw new Error(`it hangs, with\n${left.join("\n")}\n${running.stderr()}`);
      }
      expect(result.status).toBe(1);
      expect(result.stderr).toContain(places[2]);
      const arrived = events(result)
        .filter(({ event }) => event === "transfer")
        .map(({ destination }) => destination as string);
      expect(arrived.sort()).toEqual([places[0], places[1]].sort());
      for (const place of places.slice(0, 2)) {
        expectSound(place, join(home, "snapshot"));
        expect(treeDigest(join(place, "20260101-000000"))).toBe(
          treeDigest(join(home, "snapshot/20260101-000000")),
        );
      }
    } finally {
      if (frozen) sh(`fsfreeze -u "$1"`, disk);
      for (const { pid } of descendants(running.pid)) signal(pid);
      running.child.kill("SIGKILL");
      await running.finished;
    }
  },
);

describe("a stream that the other host forged", () => {
  const [zstd, protocol1] = [
    ["--compress", "zstd:1"],
    ["--protocol", "1"],
  ];
  const forms = [
    [],
    protocol1,
    zstd,
    ["--resume"],
    ["--protocol", "2"],
    ["--resume", ...zstd],
    [...zstd, ...protocol1],
    ["--resume", ...protocol1],
  ];

  test.concurrent(
    "is refused by who pulls it, in full and as a difference, whatever it travels as",
    async () => {
      const { options, url } = await sshServer();
      const it = source();
      const { path } = filesystem();
      const destination = join(path, "a", "backup");
      mkdirSync(join(path, "a"));
      writeFileSync(join(path, "a", "victim"), "mine");
      const found: unknown[] = [];
      const pull = async (name: string, kinds: readonly string[], offset: number) => {
        const before = standing(destination);
        for (const [i, kind] of kinds.entries()) {
          const form = forms[(i + offset) % forms.length] as string[];
          // Earlier ones are behind it: only the newest is asked for.
          const result = await run([
            "-S",
            "--newest-only",
            ...options,
            ...form,
            url(it.source, await liar(kind)),
            destination,
          ]);
          const now = standing(destination);
          if (String([...outcome(result), now]) !== String([...asPromised, before]))
            found.push({ name, kind, form, ...result, now });
        }
      };
      mkdirSync(destination);
      const hidden = join(it.source, "snapshot", "hidden");
      sh(`mv "$1/snapshot/$2" "$3"`, it.source, it.second, hidden);
      await pull(it.first, full, 0);
      await expectRun(0, ["-S", ...options, url(it.source), destination]);
      sh(`mv "$3" "$1/snapshot/$2"`, it.source, it.second, hidden);
      await pull(it.second, Object.keys(forgeries), 3);
      expect(found).toEqual([]);
      await expectRun(0, ["-S", "--resume", ...options, url(it.source), destination]);
      expect(snapshotNames(destination)).toEqual([it.first, it.second]);
      expect(readdirSync(destination).filter((name) => name.endsWith(".part"))).toEqual([]);
      expectSound(destination, join(it.source, "snapshot"));
    },
  );

  test.concurrent("is refused by restore and copy, and on the way to a third host", async () => {
    const { options, url } = await sshServer();
    const it = source();
    const { path } = filesystem();
    const [backup, folder] = [join(filesystem().path, "backup"), join(path, "a", "folder")];
    mkdirSync(folder, { recursive: true });
    await expectRun(0, ["-S", it.source, backup]);
    const before = standing(folder);
    const kinds = [
      "a path far out of it",
      "another name",
      "another UUID",
      "no end",
      "a clone of another subvolume",
    ];
    const found: unknown[] = [];
    // Another name of the same host is another host to the program.
    const elsewhere = [
      "--ssh-opt",
      "StrictHostKeyChecking=no",
      "--ssh-opt",
      "NoHostAuthenticationForLocalhost=yes",
    ];
    const far = url(join(folder, "far")).replace("127.0.0.1", "localhost");
    const ways: [string, (kind: string) => Promise<string[]>][] = [
      [
        "restore",
        async (kind) => [
          "restore",
          ...options,
          url(backup, await liar(kind)),
          join(folder, "home"),
        ],
      ],
      [
        "copy",
        async (kind) => ["copy", ...options, url(backup, await liar(kind)), join(folder, "copy")],
      ],
      [
        "remote to remote",
        async (kind) => ["-S", ...elsewhere, ...options, url(it.source, await liar(kind)), far],
      ],
    ];
    for (const [way, words] of ways)
      for (const kind of kinds) {
        const result = await run(await words(kind));
        sh(
          `cd "$1"; rm -rf far/.btrfs* copy/.btrfs*; for d in far copy; do [ ! -d $d ] || rmdir $d || :; done`,
          folder,
        );
        const now = standing(folder);
        if (String([...outcome(result), now]) !== String([...asPromised, before]))
          found.push({ way, kind, ...result, now });
      }
    expect(found).toEqual([]);
    await expectRun(0, ["-S", ...elsewhere, ...options, url(it.source), far]);
    expectSound(join(folder, "far"), join(it.source, "snapshot"));
  });

  const accepted = "an absolute path";
  test.concurrent(
    "is received as it is with --trust-stream, by run, copy and restore, here and remotely",
    async () => {
      const { options, url } = await sshServer();
      const it = source();
      const folder = filesystem().path;
      const places = ["run", "copy", "home"].map((name) => join(folder, name)) as [
        string,
        string,
        string,
      ];
      const trusted = ["--trust-stream", ...options];
      await expectRun(0, ["-S", ...trusted, url(it.source, await liar(accepted)), places[0]]);
      const backup = join(filesystem().path, "backup");
      await expectRun(0, ["-S", it.source, backup]);
      await expectRun(0, ["copy", ...trusted, url(backup, await liar(accepted)), places[1]]);
      await expectRun(0, ["restore", ...trusted, url(backup, await liar(accepted)), places[2]]);
      const received = [join(places[0], it.second), join(places[1], it.second), places[2]];
      expect(received.map((place) => existsSync(join(place, "escaped")))).toEqual([
        true,
        true,
        true,
      ]);
    },
  );

  test.concurrent("and the log says of --trust-stream that nobody read along", async () => {
    const { options, url } = await sshServer();
    const it = source();
    const folder = filesystem().path;
    const { stderr } = await expectRun(0, [
      "-S",
      "--trust-stream",
      ...options,
      url(it.source, await liar(accepted)),
      join(folder, "run"),
    ]);
    expect(stderr).toMatch(/trust-stream|not checked|unchecked|nobody/i);
  });
});

describe("a stream that was forged in a store, with a right sum,", () => {
  test.concurrent(
    "is refused by restore, from a folder, over ssh, and from rclone, also compressed and encrypted",
    async () => {
      const { options, url } = await sshServer();
      const [gpg, s3] = [gpgKey(), await s3Remote()];
      const env = { ...gpg.env, ...s3.env };
      const it = source();
      const [pack, seal] = [
        ["--compress", "zstd:1"],
        ["--encrypt-to", gpg.recipient],
      ];
      const filters: Record<string, string[]> = {
        plain: [],
        zst: pack,
        gpg: seal,
        both: [...pack, ...seal],
      };
      const target = join(filesystem().path, "a", "folder");
      mkdirSync(target, { recursive: true });
      const before = standing(target);
      const kinds = full;
      let turn = 0;
      const found: unknown[] = [];
      for (const [how, words] of Object.entries(filters)) {
        const folder = temporaryDirectory();
        await expectRun(0, ["-S", "--newest-only", it.source, `raw://${folder}`, ...words], {
          env,
        });
        const object = readdirSync(folder).find((name) =>
          /\.btrfs(\.zst)?(\.gpg)?$/.test(name),
        ) as string;
        // $4 and $5: gpg's home, and the recipient.
        const isSealed = how === "gpg" || how === "both";
        const isPacked = how === "zst" || how === "both";
        const open = [
          ...(isSealed ? ["GNUPGHOME=$4 gpg -q --batch --decrypt"] : []),
          ...(isPacked ? ["zstd -qdc"] : []),
        ];
        const sealing = "GNUPGHOME=$4 gpg -q --batch --trust-model always --encrypt --recipient $5";
        const close = [...(isPacked ? ["zstd -qc"] : []), ...(isSealed ? [sealing] : [])];
        const keys = [gpg.env["GNUPGHOME"] as string, gpg.recipient];
        const original = join(temporaryDirectory(), "original");
        sh(`cp "$1/$2" "$3"`, folder, object, original);
        const honest = join(temporaryDirectory(), "honest");
        sh(`${["cat <$1", ...open].join(" | ")} >$2`, original, honest, "", ...keys);
        const put = (bytes: Buffer, file = join(temporaryDirectory(), "forged")) => {
          writeFileSync(file, bytes);
          sh(
            `${["cat <$1", ...close].join(" | ")} >"$2/$3"; cd "$2"; sha256sum "$3" >"$3.sha256"`,
            file,
            folder,
            object,
            ...keys,
          );
          s3.rclone(
            `for file in "$3" "$3.sha256"; do rclone rcat "$S/$2/$file" <"$1/$file"; done`,
            folder,
            how,
            object,
          );
        };
        const places = [`raw://${folder}`, url(folder).replace("ssh:", "raw+ssh:"), s3.url(how)];
        for (const _ of how === "plain" ? kinds : kinds.slice(0, 4)) {
          const kind = kinds[turn % kinds.length] as string;
          const place = places[turn++ % places.length] as string;
          put((forgeries[kind] as (honest: Buffer) => Buffer)(readFileSync(honest)));
          const result = await run(["restore", ...options, place, join(target, "home")], { env });
          const now = standing(target);
          if (String([...outcome(result), now]) !== String([...asPromised, before]))
            found.push({ how, place, kind, ...result, now });
        }
        put(forgeries["an absolute path"]!(readFileSync(honest)));
        await expectRun(
          0,
          ["restore", "--trust-stream", ...options, places[1] as string, join(target, "trusted")],
          { env },
        );
        expect(existsSync(join(target, "trusted", "escaped"))).toBe(true);
        sh(`btrfs -q subvolume delete "$1"/snapshot/*-* "$1" >/dev/null`, join(target, "trusted"));
      }
      expect(found).toEqual([]);
    },
  );
});

describe("a stream that makes links, and goes through them,", () => {
  /** A PATH where mount forgets nosymfollow: there is no fence. */
  function unfenced(): { PATH: string } {
    const tools = temporaryDirectory();
    const forgetting = `args=(); for one; do args+=("\${one//,nosymfollow/}"); done`;
    writeFileSync(
      join(tools, "mount"),
      `#!/bin/bash\n${forgetting}; exec ${sh("command -v mount")} "\${args[@]}"\n`,
      { mode: 0o755 },
    );
    return { PATH: `${tools}:${process.env["PATH"]}` };
  }
  test.each([
    ["with the fence", () => ({}), true],
    ["without the fence", unfenced, false],
  ] as const)("does no harm %s", async (_, environment, fenced) => {
    const { options, url } = await sshServer();
    const it = source();
    const { path } = filesystem();
    sh(`chmod 755 "$1"`, path);
    const folder = (name: string) => join(path, name, "backup");
    mkdirSync(folder("honest"), { recursive: true });
    const found: unknown[] = [];
    for (const kind of Object.keys(linkForgeries)) {
      const destination = folder(kind);
      sh(`mkdir -p "$1"; echo mine >"$1/victim"; echo mine >"$1/../victim"`, destination);
      const before = standing(destination);
      const result = await run(
        ["-S", "--newest-only", ...options, url(it.source, await liar(kind)), destination],
        { env: environment() },
      );
      const [now, refused] = [standing(destination), fenced || REFUSED.test(result.stderr)];
      if (result.status !== 1 || now !== before || !refused) found.push({ kind, ...result, now });
    }
    await expectRun(0, ["-S", ...options, url(it.source), folder("honest")], {
      env: environment(),
    });
    expectSound(folder("honest"), join(it.source, "snapshot"));
    expect(found).toEqual([]);
  });
});

describe("a stream that breaks never ends:", () => {
  const large = () => {
    const home = subvolume(join(filesystem().path, "home"));
    sh(`head -c 24M /dev/urandom >"$1/file"`, home);
    snapshotAs(home, "20260101-000000");
    return home;
  };
  /** What is killed in each, with a source, a folder and a place of its own, so that all can run side by side. */
  const prepared = <T>(kinds: readonly T[]) =>
    kinds.map((kind) => ({
      kind,
      source: large(),
      directory: temporaryDirectory(),
      folder: join(filesystem().path, "folder"),
    }));
  const storing = (directory: string, name: string) =>
    `shell://cat >${directory}/${name}.tmp && mv ${directory}/${name}.tmp ${directory}/${name}.final`;
  // gpg writes a beginning before it has read anything.
  const hasBytes = (path: string) => existsSync(path) && Bun.file(path).size > 65_536;
  const began = (directory: string, name: string) => hasBytes(join(directory, `${name}.tmp`));
  const btrfsSend = /^(\S*\/)?btrfs send /;
  type Victim = [string, (one: { text: string }) => boolean];
  const isShell = (text: string) => /^(\S*\/)?(ba)?sh /.test(text);
  const stages: Victim[] = [
    ["btrfs send", ({ text }) => btrfsSend.test(text)],
    ["a relay", ({ text }) => text.includes(" --relay ") && !isShell(text)],
    ["zstd", ({ text }) => /^(\S*\/)?zstd /.test(text)],
    ["gpg", ({ text }) => /^(\S*\/)?gpg /.test(text)],
  ];
  type Choose = (all: ReturnType<typeof descendants>) => number[];
  /** Those of a kind, or their process groups. */
  const choosing =
    ([what, is]: Victim): Choose =>
    (all) =>
      all.filter(is).map(({ pid, group }) => (what === "the whole group" ? -group : pid));

  /** Runs, kills what is chosen of the processes below it, and waits for the end of all. */
  async function killing(
    args: string[],
    env: Record<string, string>,
    ready: () => boolean,
    choose: Choose,
  ) {
    const running = start(args, { env });
    try {
      let all: ReturnType<typeof descendants> = [];
      const flows = () => ready() && choose((all = descendants(running.pid))).length > 0;
      await waitFor("the stream to flow", flows).catch((error: Error) => {
        const now = descendants(running.pid).map(({ pid, text }) => `${pid} ${text.slice(0, 150)}`);
        throw new Error([error.message, args.join(" "), running.stderr(), ...now].join("\n"));
      });
      const victims = choose(all);
      for (const one of victims) signal(one);
      const result = await running.finished;
      await waitFor("all to be gone", () => all.every(({ pid }) => !isAlive(pid)));
      return { victims: victims.length, ...result };
    } finally {
      for (const { pid } of descendants(running.pid)) signal(pid);
      running.child.kill("SIGKILL");
    }
  }

  test("for one command, whichever process of the pipeline is killed, or all", async () => {
    const gpg = gpgKey();
    const found: unknown[] = [];
    const groups: Victim[] = [["the whole group", ({ text }) => btrfsSend.test(text)]];
    await Promise.all(
      prepared([...stages, ...groups]).map(async ({ kind: [what, is], source, directory }) => {
        const sealed = ["--compress", "zstd:1", "--encrypt-to", gpg.recipient];
        const args = [
          "-S",
          "--rate-limit",
          "2m",
          source,
          "--for",
          storing(directory, "x"),
          ...sealed,
        ];
        const { victims, status } = await killing(
          args,
          gpg.env,
          () => began(directory, "x"),
          choosing([what, is]),
        );
        if (victims === 0 || status !== 1 || existsSync(join(directory, "x.final")))
          found.push([what, victims, status, readdirSync(directory)]);
      }),
    );
    expect(found).toEqual([]);
  });

  test("for several that share it, whichever process is killed", async () => {
    const found: unknown[] = [];
    const fanning = ({ text }: { text: string }) => text.includes('"to":[') && !isShell(text);
    const receives = ({ text }: { text: string }) => /^cat |^(\S*\/)?btrfs receive/.test(text);
    const runs = ({ text }: { text: string }) =>
      text.startsWith("bash ") && text.includes("a.tmp") && !text.includes(" --relay ");
    const kinds: [string, Choose, boolean][] = [
      [
        "btrfs send",
        (all) => all.filter(({ text }) => btrfsSend.test(text)).map(({ pid }) => pid),
        true,
      ],
      ["the relay that feeds all", (all) => all.filter(fanning).map(({ pid }) => pid), true],
      ["the group of the stream", (all) => all.filter(fanning).map(({ group }) => -group), true],
      [
        "all groups",
        (all) => [
          ...new Set(all.filter((one) => fanning(one) || receives(one)).map(({ group }) => -group)),
        ],
        true,
      ],
      ["all relays", (all) => all.filter((one) => stages[1]?.[1](one)).map(({ pid }) => pid), true],
      [
        "one receiver",
        (all) =>
          all
            .filter(runs)
            .slice(-1)
            .map(({ pid }) => pid),
        false,
      ],
    ];
    // One after the other: side by side, they can take so long to begin that the first ones have ended.
    for (const {
      kind: [what, choose, every],
      source,
      directory,
      folder,
    } of prepared(kinds)) {
      // What is stored is protocol 1, and all share a stream only if they agree.
      const args = [
        "-S",
        "--protocol",
        "1",
        "--rate-limit",
        "2m",
        source,
        storing(directory, "a"),
        storing(directory, "b"),
        folder,
      ];
      const { victims, status, stderr } = await killing(
        args,
        {},
        () => ["a", "b"].every((name) => began(directory, name)),
        choose,
      );
      const finals = readdirSync(directory).filter((name) => name.endsWith(".final"));
      const complete = existsSync(folder)
        ? [...subvolumes(folder).values()].filter(({ readonly }) => readonly).length
        : 0;
      const wrong = every
        ? finals.length > 0 || complete > 0
        : finals.includes("a.final") || finals.length !== 1 || complete !== 1;
      if (victims === 0 || status !== 1 || wrong)
        found.push([what, victims, status, finals, complete, stderr]);
    }
    expect(found).toEqual([]);
  });

  test("in a folder of streams none gets its name, or a sum", async () => {
    const found: unknown[] = [];
    const kinds: Victim[] = [
      ...stages.slice(0, 3),
      ["the whole group", ({ text }) => btrfsSend.test(text)],
    ];
    await Promise.all(
      prepared(kinds).map(async ({ kind: [what, is], source, directory: folder }) => {
        const args = [
          "-S",
          "--rate-limit",
          "2m",
          source,
          "--for",
          `raw://${folder}`,
          "--compress",
          "zstd:1",
        ];
        const isThere = () =>
          readdirSync(folder).some(
            (name) => name.endsWith(".part") && hasBytes(join(folder, name)),
          );
        const { victims, status } = await killing(args, {}, isThere, choosing([what, is]));
        const left = readdirSync(folder).filter(
          (name) => /\.btrfs(\.zst)?(\.sha256)?$/.test(name) && !name.startsWith("."),
        );
        if (victims === 0 || status !== 1 || left.length > 0)
          found.push([what, victims, status, left]);
      }),
    );
    expect(found).toEqual([]);
  });
});
