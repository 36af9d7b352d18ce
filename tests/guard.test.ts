// A stolen key: over a guarded one all works that its options allow, and nothing else runs, whatever
// is sent, and whatever is in the stream.

import { describe, expect, test } from "bun:test";
import { spawn, spawnSync } from "node:child_process";
import {
  existsSync,
  mkdirSync,
  readFileSync,
  readdirSync,
  rmSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import {
  commandFor,
  guardedRecord,
  narrowedAnswer,
  parametersOf,
  parseCommand,
  parseInspection,
  permitted,
  quote,
  streamCheck,
  VERBS,
  type GuardOptions,
} from "../btrfs-backup.ts";
import { attribute, command, stream, streamOf } from "./support/stream.ts";
import {
  change,
  contentsDigest,
  events,
  expectRun,
  expectSound,
  fill,
  filesystem,
  nextSecond,
  pair,
  ROOT,
  sh,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  subvolumes,
  temporaryDirectory,
  treeDigest,
  waitFor,
} from "./support/rig.ts";
import { fsidOf, HOST, sent, verbNamed } from "./support/wire.ts";
import { generator, seeded, soak } from "./support/random.ts";
import { numberedUuid } from "./support/names.ts";

const OBJECT = `20260101-000000+0000_12345678_12345678_${numberedUuid(1)}_${numberedUuid(2)}_full.btrfs`;

/** A server's folder with backups of this key's, and of another's; `guard` runs the real program with a command. */
async function server(...flags: string[]) {
  const { source, destination, b } = pair();
  const mine = join(b.path, "laptop");
  mkdirSync(mine);
  mkdirSync(`${mine}2`); // it begins alike
  const home = join(mine, "home");
  await expectRun(0, [source, home, join(`${mine}2`, "home"), `raw://${join(mine, "raw")}`]);
  const [name = ""] = snapshotNames(home);
  symlinkSync("/", join(mine, "link"));
  const log = join(temporaryDirectory(), "log");
  const tools = temporaryDirectory();
  writeFileSync(join(tools, "logger"), `#!/bin/sh\nprintf '%s\\n' "$*" >>"${log}"\n`, {
    mode: 0o755,
  });
  writeFileSync(
    join(tools, "btrfs"),
    `#!/bin/sh\n[ "$1" != receive ] || echo "$@" >>"${log}.receive"\nexec ${sh("command -v btrfs")} "$@"\n`,
    { mode: 0o755 },
  );
  const guard = (
    text: string,
    { input = Buffer.alloc(0) as Buffer, options = flags, env = {} as Record<string, string> } = {},
  ) =>
    new Promise<{ status: number | null; stdout: string; stderr: string }>((done) => {
      const child = spawn(join(ROOT, "dist/btrfs-backup"), ["guard", "--path", mine, ...options], {
        cwd: tools,
        env: {
          PATH: `${tools}:${process.env["PATH"]}`,
          SSH_CONNECTION: "192.0.2.1 1 192.0.2.2 22",
          SSH_ORIGINAL_COMMAND: text,
          ...env,
        },
      });
      const texts = { stdout: "", stderr: "" };
      child.stdout.on("data", (data) => (texts.stdout += data));
      child.stderr.on("data", (data) => (texts.stderr += data));
      child.on("close", (status) => done({ status, ...texts }));
      child.stdin.on("error", () => {});
      child.stdin.end(input);
    });
  const logged = () => (existsSync(log) ? readFileSync(log, "utf8").trimEnd().split("\n") : []);
  /** How it has run `btrfs receive`. */
  const received = () => readFileSync(`${log}.receive`, "utf8");
  return {
    source,
    destination,
    b,
    mine,
    received,
    home,
    raw: join(mine, "raw"),
    name,
    guard,
    logged,
    tools,
    fsid: fsidOf(home),
  };
}
/** Everything on a filesystem, to see whether anything has changed. */
const state = (path: string) =>
  sh(
    `cd "$1"; find . -inum 2 -prune -o -printf '%p %y %m %U %s %T@ %l\\n' | sort | sha256sum; btrfs subvolume list -u -R . | sed 's/gen [0-9]*//' | sha256sum; find . -name '.btrfs-backup*' -type f -exec sha256sum {} + | sort`,
    path,
  );

/** Commands that no key may run, around one that it may. */
function corpus({ mine, home, raw, name, fsid, b }: Awaited<ReturnType<typeof server>>): string[] {
  const nonce = crypto.randomUUID();
  const record = (chain: unknown) => ['{"/": 1', ',"": ', JSON.stringify(chain)] as const;
  const owner = { uuid: numberedUuid(9), host: "laptop", path: "/home" };
  const good = {
    open: sent("open", nonce, "look", home, "", "", "", "60"),
    receive: sent(
      "receive",
      "-q",
      home,
      fsid,
      "",
      "1",
      "",
      ...record({ owner }).slice(0, 2),
      '{"receiving":"20300101-000000",',
      JSON.stringify({ owner }).slice(1),
    ),
    create: sent("create", home, fsid, "x-"),
    record: sent("record", home, fsid, ...record({ owner })),
    store: sent("store", raw, fsid, "", OBJECT, "1", ""),
    commit: sent("commit", raw, fsid, "", OBJECT, "0".repeat(64), "5"),
  };
  const text = good.open;
  const evil = "touch pwned";
  const all = [
    "",
    " ",
    "sh",
    "sh -c",
    "sh -c ",
    evil,
    "bash -i",
    "/bin/sh",
    "scp -t .",
    "scp -f /etc/shadow",
    "rsync --server --sender -logDtpre.iLsfxC . /etc",
    "rsync --rsh=sh --server . .",
    "sftp-server",
    "/usr/lib/openssh/sftp-server",
    "internal-sftp",
    "btrfs subvolume list /",
    "btrfs-backup guard --path /",
    "git-upload-pack /",
    "cat /etc/passwd",
    "env",
    "exit 0",
    ":",
    "true",
    "python3 -c 'import os'",
    "sudo -n btrfs subvolume delete /",
    `sh -c '${evil}'`,
    `sh -c '${evil}' 'btrfs-backup:nothing' ''`,
    `sh -c '${evil}' btrfs-backup:open ''`,
    `sh -c "${evil}" 'btrfs-backup:open' ''`,
    `sh -c '${evil}' 'btrfs-backup:open' '' '$(${evil})'`,
    `bash -c '${evil}' 'btrfs-backup:open' ''`,
  ];
  // What stands around and between the words.
  const separators = [
    ";",
    "&&",
    "||",
    "|",
    "&",
    ">",
    "<",
    "\n",
    "\r",
    "\t",
    "`",
    "$(",
    "#",
    "\\",
    "!",
    "\u00a0",
    "\u2028",
    "\u3000",
    "''",
    '"',
    "*",
    "~",
    "{a,b}",
    "\x1b[0m",
    "\x07",
    "\u202e",
  ];
  for (const one of separators) {
    all.push(
      `${text}${one}${evil}`,
      `${text} ${one} ${evil}`,
      `${evil}${one}${text}`,
      `${one}${text}`,
      text.replace("sh -c ", `sh -c${one}`),
      text.replace("' '", `'${one}'`),
      text.replace("' '", `' ${one} '`),
      text.replace(`'${nonce}'`, `'${nonce}'${one}`),
      text.replace(`'${nonce}'`, `${one}'${nonce}'`),
    );
    for (const part of [nonce, "look", "60"])
      all.push(text.replace(`'${part}'`, `'${part}${one.replace(/['\\!]/g, (c) => `'\\${c}'`)}x'`));
  }
  for (const shell of [
    "SH -c",
    "sh -C",
    "sh -ec",
    "sh  -c",
    "/bin/sh -c",
    "ash -c",
    "sh --posix -c",
    "command sh -c",
    "exec sh -c",
    "X=1 sh -c",
    "LD_PRELOAD=/tmp/x sh -c",
    "BASH_ENV=/tmp/x sh -c",
    "env -i sh -c",
    "sudo sh -c",
    "nice sh -c",
    "ѕh -c",
    "ｓｈ -c",
  ])
    all.push(text.replace("sh -c", shell));
  for (let i = 1; i < text.length; i += 97) all.push(text.slice(0, i), text.slice(i));
  // Other verbs, ours and nobody's.
  const names = [
    "hook",
    "put",
    "aside",
    "build",
    "finish",
    "clear",
    "restoring",
    "top",
    "snapshot",
    "send",
    "estimate",
    "delete",
    "fetch",
    "digest",
    "listing",
    "sizes",
    "take",
    "locate",
    "versions",
    "received",
    "rclone-list",
    "rclone-store",
    "rclone-commit",
    "rclone-fetch",
    "rclone-drop",
    "constructor",
    "__proto__",
    "toString",
    "hasOwnProperty",
    "OPEN",
    "Open",
    "open ",
    " open",
    "ореn",
    "open\u0000".slice(0, 4) + "\u200b",
    "guard",
    "run",
    "",
    "-",
    "--",
    "open;id",
    "open/../hook",
    "open:hook",
    "hook:open",
    "sh",
    "open\u0301",
    "sudo",
    "prune",
  ];
  for (const other of names)
    for (const rest of [
      [],
      [home],
      [evil],
      [nonce, "look", home, "", "", "", "60"],
      [home, fsid, name],
      [home, fsid, `./${name}`],
      ["", "", home, fsid, `./${name}`],
    ])
      all.push(
        commandFor(HOST, { name: other, script: "exit 0" }, rest).replace(
          other === "open" ? "" : "\0",
          "",
        ),
      );
  for (const how of ["root", "sudo ", "SUDO", "-n", "sudo -n", "1", "sudo\u200b"])
    all.push(text.replace("'btrfs-backup:open' ''", `'btrfs-backup:open' '${how}'`));
  // Other places.
  const places = [
    "/",
    "/etc",
    "/root/.ssh",
    b.path,
    `${mine}2`,
    `${mine}2/home`,
    `${mine}/..`,
    `${mine}/../laptop2`,
    `${mine}/../laptop2/home`,
    `${home}/..`,
    `${home}/../../laptop2`,
    `${home}/.`,
    `${home}/`,
    `/${home}`,
    `${mine}//home`,
    `${mine}/link`,
    `${mine}/link/etc`,
    `${mine}/link${mine}2`,
    `${home}/${name}`,
    `${home}/${name}/plain`,
    `${home}/${name}/snapshot`,
    `${home}/20990101-000000/x`,
    "home",
    "./home",
    "../laptop/home",
    "~",
    "~root",
    "$HOME",
    "",
    " ",
    `${mine} `,
    ` ${home}`,
    `${mine}\u2215home`,
    `${mine}%2fhome`,
    `${home}\u0000`.slice(0, -1) + "\u200b/../../x",
    `-${home}`,
    `--path=${home}`,
    "file:///etc",
    "ssh://x/y",
    `${mine}/home/\u002e\u002e/\u002e\u002e/laptop2`,
    "/proc/self/root/etc",
    "/dev/fd/0",
    `${mine}/link/proc/self/cwd`,
  ];
  for (const place of places) {
    all.push(
      sent("open", nonce, "look", place, "", "", "", "60"),
      sent("create", place, fsid, ""),
      sent("record", place, fsid, ...record({ owner })),
      sent("store", place, fsid, "", OBJECT, "1", ""),
      sent(
        "receive",
        "-q",
        place,
        fsid,
        "",
        "1",
        "",
        ...record({ owner }).slice(0, 2),
        '{"receiving":"20300101-000000",',
        JSON.stringify({ owner }).slice(1),
      ),
    );
    all.push(sent("open", nonce, "look", home, "", place === "" ? "/" : place, "", "60"));
  }
  // Arguments that are options, commands, names of something else, or too large.
  const injections = [
    "--rsh=sh",
    "-e sh",
    "-f/etc/passwd",
    "--file=/etc/passwd",
    "--dump",
    "-C",
    "-vvv",
    "-q -f x",
    `;${evil}`,
    `$(${evil})`,
    `\`${evil}\``,
    `|${evil}`,
    "../x",
    "..",
    ".",
    "a/b",
    "/etc/passwd",
    "*",
    "-1",
    "1e9g",
    "0x1",
    "999999999999",
    "NaN",
    "１２",
    "\u202e",
    "x".repeat(2000),
    "'",
    "!",
    "\\",
    "20260101-000000/../../x",
    "20261301-000000",
    `../${name}`,
    `./${name}/..`,
    "%s%n",
    "${IFS}",
    "a\tb",
  ];
  for (const one of injections) {
    all.push(
      sent("receive", one, home, fsid, "", "1", "", "", "", "", ""),
      sent("receive", "-q", home, `${one}.`, "", "1", "", "", "", "", ""),
      sent("receive", "-q", home, fsid, one, "1", "", "", "", "", ""),
      sent("receive", "-q", home, fsid, "", `${one}x`, "", "", "", "", ""),
    );
    all.push(
      sent("open", `${one}.`, "look", home, "", "", "", "60"),
      sent("open", nonce, `${one}-`, home, "", "", "", "60"),
      sent("open", nonce, "look", home, "", "", `${one}s`, "60"),
      sent("open", nonce, "look", home, "", "", "", `${one}x`),
      sent("open", nonce, "look", home, `${one}/`, "", "", "60"),
    );
    all.push(
      sent("store", raw, fsid, "", one, "1", ""),
      sent("store", raw, fsid, "", `${one}${OBJECT}`.replace(/^x+/, "/"), "1", ""),
      sent("store", raw, fsid, "", OBJECT, "1", `${one}.`),
      sent("store", raw, fsid, "p-", OBJECT, "1", ""),
      sent("commit", raw, fsid, "", OBJECT, one, "5"),
      sent("commit", raw, fsid, "", OBJECT, "0".repeat(64), `${one}x`),
      sent("drop", raw, fsid, "", one),
      sent("drop", raw, fsid, "", OBJECT, one),
      sent("discard", home, fsid, "", one, ...record({ owner })),
    );
    all.push(
      sent("record", home, fsid, one, ',"": ', "{}"),
      sent("record", home, fsid, '{"/": 1', one, "{}"),
      sent("record", home, fsid, '{"/": 1', ',"": ', one),
      sent("record", home, fsid, '{"/": 1', `,${JSON.stringify(`${one}/`)}: `, "{}"),
    );
  }
  const stored = readdirSync(raw).filter((file) => file.endsWith(".btrfs"))[0] as string;
  const chains: unknown[] = [
    { owner, receiving: name },
    { owner, receiving: "../x" },
    { owner, receiving: "20300101-000000/.." },
    {
      owner,
      destinations: [{ location: `shell://${evil}`, filesystem: null, pin: null, last: null }],
    },
    { owner, destinations: [] },
    { owner, strangers: "x" },
    { owner: "x" },
    { owner, evil },
    { owner, guarded: 1 },
    [],
    null,
    1,
    "x",
  ];
  for (const chain of chains)
    all.push(
      sent("record", home, fsid, ...record(chain)),
      sent("discard", home, fsid, "", name, ...record(chain)),
    );
  all.push(
    sent("discard", home, fsid, "", name, ...record({ owner })),
    sent("discard", home, fsid, "", name, "", "", ""),
    sent("commit", raw, fsid, "", stored, "0".repeat(64), "5"),
    sent("drop", raw, fsid, "", stored),
    sent("drop", raw, fsid, "", `${stored}.sha256`),
    sent("fetch", raw, fsid, "", "1", stored),
    sent("fetch", raw, fsid, "sum", "1", stored),
  );
  for (const verb of Object.values(good))
    all.push(`${verb} 'x'`, verb.replace(/ '[^']*'$/, ""), verb + " ''".repeat(500));
  all.push(
    sent("drop", raw, fsid, "", ...Array.from({ length: 900 }, () => OBJECT)),
    sent("open", nonce, "look", `${home}/${"x".repeat(90_000)}/..`, "", "", "", "60"),
    "A".repeat(120_000),
    `sh -c '${"a".repeat(120_000)}`,
  );
  return [...new Set(all)].filter(
    (one) => !one.includes("\0") && !Object.values(good).includes(one),
  );
}

test("hundreds of hostile commands: none runs, each is answered with one line, and logged", async () => {
  const it = await server();
  const commands = corpus(it);
  console.log(`${commands.length} commands`);
  expect(commands.length).toBeGreaterThan(1000);
  const before = state(it.b.path);
  const random = seeded();
  const o = {
    paths: [it.mine],
    source: false,
    allowRead: false,
    allowDelete: false,
    maxBytes: null,
  };
  const isPermitted = await Promise.all(
    commands.map((text) =>
      permitted(text, o).then(
        () => true,
        () => false,
      ),
    ),
  );
  // Each is a start of the program: what is refused at once is sampled (SOAK: so many), the rest is sent.
  const share = soak(300) / commands.length;
  const served = commands.filter((_, i) => isPermitted[i] || random() < share);
  const waiting = [...served.entries()];
  const answers: { text: string; status: number | null; stdout: string; stderr: string }[] = [];
  await Promise.all(
    [1, 2, 3].map(async () => {
      for (let next; (next = waiting.shift()) !== undefined;)
        answers.push({ text: next[1], ...(await it.guard(next[1])) });
    }),
  );
  for (const { text, status, stdout, stderr } of answers)
    expect([
      text.slice(-300),
      status,
      stdout,
      stderr.replace(/refused: [^\n]+\n$/, "refused"),
    ]).toEqual([text.slice(-300), 65, "", "btrfs-backup guard: refused"]);
  expect(it.logged().length).toBe(served.length);
  for (const line of it.logged())
    expect(line).toMatch(/^-t btrfs-backup -p auth\.warning -- guard refused 192\.0\.2\.1: /);
  expect(state(it.b.path)).toBe(before);
  expect(readdirSync(it.tools).sort()).toEqual(["btrfs", "logger"]);
}, 600_000);

test("random commands over the grammar: what is let through is a verb of ours, with arguments inside of the path", async () => {
  const it = await server();
  const random = seeded();
  const pick = <T>(all: readonly T[]) => all[Math.floor(random() * all.length)] as T;
  const nonce = crypto.randomUUID();
  const words = [
    nonce,
    "look",
    "0",
    "5",
    it.home,
    it.raw,
    it.mine,
    `${it.mine}/new`,
    `${it.mine}2`,
    "/etc",
    `${it.mine}/link/etc`,
    it.fsid,
    "",
    "-q",
    "-vv",
    "streams",
    "sudo",
    "60",
    it.name,
    `./${it.name}`,
    "20300101-000000",
    OBJECT,
    `.${OBJECT}.part`,
    "0".repeat(64),
    '{"/": 1',
    ',"": ',
    '{"owner":{"uuid":"u","host":"h","path":"/p"}}',
    '{"receiving":"20300101-000000",',
    '"owner":{"uuid":"u","host":"h","path":"/p"}}',
    "..",
    "$(touch pwned)",
    "a'b",
    "c\\d",
    "e!f",
    "ü☃",
    "3",
  ];
  const shapes = [
    "open",
    "create",
    "record",
    "receive",
    "discard",
    "store",
    "commit",
    "drop",
    "fetch",
    "delete",
    "received",
    "snapshot",
    "send",
    "digest",
    "versions",
    "take",
    "locate",
    "hook",
    "put",
    "finish",
  ];
  const right: Record<string, string[]> = {
    open: [nonce, "look", it.home, "", "", "", "60"],
    create: [it.home, it.fsid, ""],
    record: [it.home, it.fsid, '{"/": 1', ',"": ', '{"owner":{"uuid":"u","host":"h","path":"/p"}}'],
    store: [it.raw, it.fsid, "", OBJECT, "1", ""],
    receive: ["-q", it.home, it.fsid, "", "1", "", "", "", "", ""],
  };
  const before = state(it.b.path);
  let passed = 0;
  for (let i = 0; i < soak(3000); i++) {
    const name = pick(shapes);
    const args = [
      ...(right[name] ?? Array.from({ length: Math.floor(random() * 8) }, () => pick(words))),
    ];
    for (let changes = Math.floor(random() * 3); changes > 0; changes--) {
      const at = Math.floor(random() * (args.length + 1));
      args.splice(at, Math.floor(random() * 2), ...(random() < 0.7 ? [pick(words)] : []));
    }
    let text = commandFor(
      { ...HOST, sudo: random() < 0.1 },
      { ...verbNamed(name), script: pick(["exit 0", "touch pwned", "it's \\ !"]) },
      args,
    );
    const damaged = random() < 0.2;
    if (damaged)
      text =
        text.slice(0, Math.floor(random() * text.length)) +
        pick(["'", "\\", "!", ";", "\n", " ", "''"]) +
        text.slice(Math.floor(random() * text.length));
    const o: GuardOptions = {
      paths: [it.mine],
      source: random() < 0.2,
      allowRead: random() < 0.2,
      allowDelete: random() < 0.2,
      maxBytes: null,
    };
    const result = await permitted(text, o).catch((error: Error) => error);
    if (result instanceof Error) {
      expect([
        ["Refused", "Absent", "Missing"].includes(result.constructor.name),
        result.message,
        text,
      ]).toEqual([true, result.message, text]); // absent: below the path, but not there
      continue;
    }
    passed++;
    // The same verb of ours, whatever script was sent; and of places only those below the path.
    expect(VERBS).toContain(result.verb);
    expect(shapes.slice(0, 17)).toContain(result.verb.name);
    const parameters = parametersOf(result.verb);
    // A path in a snapshot, and a line of the record, which is checked when it is served.
    const inside = (at: number) =>
      ["inner", "beginning", "rest", "value"].includes(
        parameters[Math.min(at, parameters.length - 1)]?.name ?? "",
      );
    for (const [at, arg] of result.args.entries())
      if (arg.startsWith("/") && !inside(at))
        expect([arg, result.verb.name, `${arg}/`.startsWith(`${it.mine}/`)]).toEqual([
          arg,
          result.verb.name,
          true,
        ]);
    if (!damaged) expect(parseCommand(text).args).toEqual(args);
  }
  console.log(`${passed} were let through`);
  expect(passed).toBeGreaterThan(soak(3000) / 20);
  expect(state(it.b.path)).toBe(before);
}, 600_000);

test("a command is read as every login shell would read it, or not at all", () => {
  for (const words of [["it's"], ["a b", ""], ["back\\slash!", "'"], ["ü ☃ $(x)"]])
    expect(parseCommand(sent("open", ...words)).args).toEqual(words);
  for (const text of [
    "sh -c 'a' 'btrfs-backup:open' '' 'x\0y'",
    "sh -c 'a' 'btrfs-backup:open' '' 'x\ny'",
    "sh -c 'a' 'btrfs-backup:open' ''x",
    "sh -c 'a' 'btrfs-backup:open' '' 'a'\\n'",
    `sh -c ${quote("x")}${quote("btrfs-backup:open")} ''`,
  ])
    expect(() => parseCommand(text)).toThrow();
});

describe("over a guarded key all works that its options allow", () => {
  const folder = (b: { path: string }) => {
    const mine = join(b.path, "laptop");
    mkdirSync(mine);
    return mine;
  };

  test("run: full, incremental, compressed, stored as streams, a chain's repair; but no deletion and no reading", async () => {
    const { source, snapshots, b } = pair();
    const { guarded, url } = await sshServer();
    const mine = folder(b);
    const options = guarded("--path", mine);
    const [home, raw] = [join(mine, "home"), join(mine, "raw")];
    const random = generator(3);
    for (let i = 0; i < 3; i++) {
      change(source, random);
      const result = await expectRun(0, [
        ...options,
        "--json",
        "--full-every",
        "2",
        ...(i === 1 ? ["--compress", "zstd"] : []),
        source,
        url(home),
        `raw+${url(raw)}`,
      ]);
      for (const { parent } of events(result).filter(
        ({ event, destination }) => event === "transfer" && destination === url(home),
      ))
        expect(parent === null).toBe(i === 0);
      await nextSecond();
    }
    expectSound(home, snapshots);
    await expectRun(0, ["verify", source, home]);
    await expectRun(0, ["verify", `raw://${raw}`]);
    // What is killed in the middle is repaired.
    sh(`head -c 60M /dev/urandom >"$1/large"`, source);
    const running = start([...options, "--rate-limit", "10m", source, url(home)], { group: true });
    await waitFor("the transfer", () =>
      [...subvolumes(home).values()].some(({ readonly }) => !readonly),
    );
    process.kill(-running.pid, "SIGKILL");
    await running.finished;
    await expectRun(0, [...options, "--wait", "30", source, url(home)]);
    expectSound(home, snapshots);
    expect(snapshotNames(home)).toEqual(snapshotNames(snapshots));
    // And so is a store.
    const storing = start([...options, "-S", "--rate-limit", "10m", source, `raw+${url(raw)}`], {
      group: true,
    });
    await waitFor("the transfer", () => readdirSync(raw).some((file) => file.endsWith(".part")));
    process.kill(-storing.pid, "SIGKILL");
    await storing.finished;
    await expectRun(0, [...options, "-S", "--wait", "30", source, `raw+${url(raw)}`]);
    await expectRun(0, ["verify", `raw://${raw}`]);
    const before = state(b.path);
    for (const place of [url(home), `raw+${url(raw)}`]) {
      expect((await expectRun(1, [...options, "-S", "-n", "1", source, place])).stderr).toContain(
        "--allow-delete",
      );
      expect((await expectRun(1, ["prune", ...options, "-n", "1", place])).stderr).toContain(
        "--allow-delete",
      );
      expect(
        (await expectRun(1, ["restore", ...options, place, join(source, "../back")])).stderr,
      ).toContain("--allow-read");
      // What is there is not told a secret: a run has to know it.
      await expectRun(0, ["list", ...options, place]);
    }
    expect((await expectRun(1, ["verify", ...options, source, url(home)])).stderr).toContain(
      "--allow-read",
    );
    expect(
      (await expectRun(1, ["restore", ...options, snapshots, url(join(mine, "restored"))])).stderr,
    ).toContain("refused");
    expect((await expectRun(1, [...options, "-S", source, url(`${mine}2`)])).stderr).toContain(
      "is not below",
    );
    expect(existsSync(join(source, "../back"))).toBe(false);
    expect(state(b.path)).toBe(before);
  });

  test("restore, verify, versions and sizes with --allow-read; retention and prune with --allow-delete", async () => {
    const { source, b } = pair();
    const { guarded, url } = await sshServer();
    const mine = folder(b);
    const [home, raw] = [join(mine, "home"), join(mine, "raw")];
    const options = guarded("--path", mine, "--allow-read", "--allow-delete");
    const places = [url(home), `raw+${url(raw)}`];
    for (let i = 0; i < 4; i++) {
      writeFileSync(join(source, "file"), String(i));
      await expectRun(0, [
        ...options,
        "-N",
        "3",
        "-n",
        "3",
        "--full-every",
        "2",
        source,
        ...places,
      ]);
      await nextSecond();
    }
    expect(snapshotNames(home).length).toBe(3);
    for (const [i, place] of places.entries()) {
      await expectRun(0, [
        "restore",
        ...options,
        ...(i === 0 ? ["--compress", "zstd"] : []),
        place,
        join(source, `../back-${i}`),
      ]);
      expect(contentsDigest(join(source, `../back-${i}`))).toBe(contentsDigest(source));
    }
    await expectRun(0, ["verify", "--all", ...options, source, url(home)]);
    await expectRun(0, ["verify", ...options, `raw+${url(raw)}`]);
    expect(
      (await expectRun(0, ["list", "--size", ...options, source, ...places])).stdout,
    ).toContain("whole");
    const versions = await expectRun(0, [
      "versions",
      "--json",
      ...options,
      join(source, "file"),
      url(home),
    ]);
    expect(events(versions).filter(({ event }) => event === "version").length).toBe(3);
    // A key that may not read keeps nobody from the snapshots that are here.
    const file = join(source, "file");
    const adding = [...guarded("--path", mine), file, url(home)];
    const partly = await expectRun(1, ["versions", "--json", ...adding]);
    expect(partly.stderr).toContain(`${url(home)}: `);
    expect(events(partly).filter(({ event }) => event === "version").length).toBe(3);
    const oldest = snapshotNames(home)[0] as string;
    await expectRun(0, ["versions", ...adding, "--get", oldest]);
    expect(readFileSync(`${file}.${oldest}`, "utf8")).toBe("1");
    sh(`rm -r "$1"/snapshot/../file`, source);
    await expectRun(0, [
      "versions",
      ...options,
      join(source, "plain/1"),
      url(home),
      "--get",
      snapshotNames(home)[0] as string,
      "--to",
      join(source, "again"),
    ]);
    await expectRun(0, ["prune", ...options, "-n", "1", url(home)]);
    await expectRun(0, ["prune", ...options, "-n", "1", `raw+${url(raw)}`]);
    expect(snapshotNames(home).length).toBe(1);
    await expectRun(0, ["verify", `raw://${raw}`]);
  });

  test("pulling with --source: snapshots, transfers of every kind, retention; and nothing else", async () => {
    const { source, snapshots, destination, b } = pair();
    const { guarded, url } = await sshServer();
    const options = guarded("--path", source, "--source");
    const out = join(temporaryDirectory(), "out");
    for (let i = 0; i < 3; i++) {
      writeFileSync(join(source, "file"), String(i));
      await expectRun(0, [
        ...options,
        "-N",
        "2",
        ...(i === 1 ? ["--compress", "zstd"] : []),
        url(source),
        destination,
        `raw://${join(b.path, "raw")}`,
        `shell://cat >>${out}`,
      ]);
      await nextSecond();
    }
    expectSound(destination, snapshots);
    expect(snapshotNames(snapshots).length).toBe(2);
    expect(snapshotNames(destination).length).toBe(3);
    await expectRun(0, ["list", ...options, url(source), destination]);
    // A record that such a key wrote makes nobody run what it says.
    expect((await expectRun(1, ["-S", "--locked-dests", source])).stderr).toContain(
      "was written by a guarded key",
    );
    const before = state(b.path);
    const kept = snapshotNames(snapshots);
    expect(
      (
        await expectRun(1, [
          ...options,
          "--before-snapshot",
          "touch pwned",
          url(source),
          destination,
        ])
      ).stderr,
    ).toContain("the verb hook");
    expect((await expectRun(1, ["verify", ...options, url(source), destination])).stderr).toContain(
      "--allow-read",
    );
    expect(
      (await expectRun(1, [...options, "--skip-fs-checks", source, url(join(source, "x"))])).stderr,
    ).toContain("receive needs a key without --source");
    expect(
      (await expectRun(1, ["restore", ...options, destination, url(join(source, "back"))])).stderr,
    ).toContain("refused");
    expect(existsSync("pwned")).toBe(false);
    expect(snapshotNames(snapshots).slice(0, 2)).toEqual(kept);
    expect(state(b.path)).toBe(before);
    const reading = guarded("--path", source, "--source", "--allow-read");
    await expectRun(0, ["verify", ...reading, url(source), destination]);
    await expectRun(0, ["versions", ...reading, url(join(source, "file")), destination]);
    // Not even this key may take the newest snapshot away.
    const it = {
      fsid: fsidOf(snapshots),
      names: snapshotNames(snapshots),
      standing: subvolumes(snapshots),
    };
    const idsOf = (...names: string[]) => names.map((name) => it.standing.get(name)?.id).join(" ");
    const guard = (ids: string, ...names: string[]) =>
      spawnSync(join(ROOT, "dist/btrfs-backup"), ["guard", "--path", source, "--source"], {
        env: {
          PATH: process.env["PATH"],
          SSH_ORIGINAL_COMMAND: sent(
            "delete",
            "",
            snapshots,
            it.fsid,
            "/home/snapshot",
            ids,
            ...names.map((name) => `./${name}`),
          ),
        },
      });
    const [first = ""] = it.names;
    expect(guard(idsOf(...it.names), ...it.names).status).toBe(65);
    expect(guard(idsOf(it.names[1] as string), first).status).toBe(65);
    expect(guard("", first).status).toBe(65);
    expect(snapshotNames(snapshots)).toEqual(it.names);
    expect(guard(idsOf(first), first).status).toBe(0);
    expect(snapshotNames(snapshots)).toEqual(it.names.slice(1));
  });
});

test("what a key is told of the rest of the machine: nothing", async () => {
  const it = await server();
  subvolume(join(it.b.path, "secret-of-others"));
  const nonce = crypto.randomUUID();
  const { status, stdout } = await it.guard(sent("open", nonce, "look", it.home, "", "", "", "60"));
  expect(status).toBe(0);
  expect(stdout).toContain(it.name);
  expect(stdout).not.toMatch(/secret-of-others|laptop2/);
  const { mounts, subvolumes: listed } = parseInspection(stdout, nonce, it.home);
  expect(listed.map(({ path }) => path)).toEqual([`laptop/home/${it.name}`]);
  expect(mounts.every(({ path }) => it.home.startsWith(path) || path.startsWith(it.home))).toBe(
    true,
  );
  expect(narrowedAnswer(stdout, nonce, it.home)).toBe(stdout);
});

test("a directory that becomes a link after it was checked is not gone into", async () => {
  const it = await server();
  symlinkSync(it.home, join(it.mine, "there"));
  for (const [verb, ...args] of [
    ["digest", it.name],
    ["delete", `./${it.name}`],
    ["create", ""],
  ] as const) {
    const through =
      verb === "delete"
        ? ["", join(it.mine, "there"), it.fsid, "/laptop/home", "", ...args]
        : [join(it.mine, "there"), it.fsid, ...args];
    const result = spawnSync("sh", ["-c", sent(verb, ...through)], { encoding: "utf8" });
    expect([verb, result.status, result.stderr]).toEqual([
      verb,
      66,
      expect.stringContaining("another filesystem or directory is at"),
    ]);
  }
  expect(snapshotNames(it.home)).toEqual([it.name]);
  // Nor is what is to be snapshotted: its data would be in a folder that the key may read.
  symlinkSync(it.source, join(it.mine, "source"));
  const result = spawnSync(
    "sh",
    [
      "-c",
      sent(
        "snapshot",
        join(it.mine, "source"),
        join(it.source, "snapshot"),
        fsidOf(join(it.source, "snapshot")),
        "20300101-000000",
      ),
    ],
    { encoding: "utf8" },
  );
  expect([result.status, result.stderr]).toEqual([66, expect.stringContaining("leads to")]);
  expect(snapshotNames(join(it.source, "snapshot"))).toEqual([it.name]);
});

test("what became complete between a look and the lock is neither deleted nor doubled", async () => {
  const it = await server();
  const object = readdirSync(it.raw).find((name) => name.endsWith(".btrfs")) as string;
  const before = state(it.b.path);
  const verb = (name: string, ...args: string[]) =>
    spawnSync("sh", ["-c", sent(name, it.raw, it.fsid, "", ...args)], { encoding: "utf8" });
  expect(verb("drop", `${object}.sha256`).status).toBe(0);
  expect(state(it.b.path)).toBe(before);
  const [, stored = ""] = /_([0-9a-f-]{36})_full/.exec(object) ?? [];
  const again = OBJECT.replace(numberedUuid(2), stored);
  expect(verb("store", again, "1", "").status).toBe(0);
  expect(verb("commit", again, "0".repeat(64), "0", "", "", stored)).toMatchObject({
    status: 76,
    stderr: expect.stringContaining("is there"),
  });
  expect(readdirSync(it.raw)).not.toContain(again);
  expect(verb("drop", `.${again}.part`, object, `${object}.sha256`).status).toBe(0);
  expect(readdirSync(it.raw).filter((name) => name.includes(stored))).toEqual([]);
});

test("a record over a guarded key can take nothing away", () => {
  const owner = { uuid: numberedUuid(1), host: "h", path: "/p" };
  const known = [{ location: "/x", filesystem: null, pin: null, last: null }];
  const now = {
    chain: {
      owner,
      receiving: "20260101-000000",
      strangers: [numberedUuid(2)],
      destinations: known,
    },
    standing: [],
    entries: new Set(["20260101-000000", "20260102-000000"]),
    prefix: "",
  };
  const write = (chain: unknown, source = false) =>
    guardedRecord(JSON.stringify(chain), now, source);
  expect(write({ ...now.chain })).toEqual(now.chain);
  expect(write({ ...now.chain, receiving: "20260103-000000" }).receiving).toBe("20260103-000000");
  expect(write({ ...now.chain, owner: { ...owner, uuid: numberedUuid(3) } }).owner?.uuid).toBe(
    numberedUuid(3),
  ); // it was restored
  for (const change of [
    { owner: { ...owner, path: "/q" } },
    { owner: { ...owner, host: "i" } },
    { owner: undefined },
    { strangers: [numberedUuid(2), numberedUuid(3)] },
    { receiving: "20260102-000000" },
    { receiving: "elsewhere" },
    { strangers: [] },
    { strangers: undefined },
    { destinations: [] },
    { destinations: undefined },
    { evil: 1 },
    { owner: 1 },
  ])
    expect(() => write({ ...now.chain, ...change })).toThrow();
  // A source's destinations may change, but are marked.
  expect(write({ ...now.chain, destinations: [] }, true).guarded).toBe(true);
  expect(
    guardedRecord(
      JSON.stringify(now.chain),
      { ...now, chain: { ...now.chain, guarded: true } },
      true,
    ).guarded,
  ).toBe(true);
  for (const text of [
    "{}x",
    "[]",
    "null",
    '{"owner":{"uuid":"a","host":"b","path":"c"} }',
    `{}\n,"y": {}`,
  ])
    expect(() => guardedRecord(text, now, false)).toThrow();
});

describe("a hostile stream", () => {
  const P = (path: string) => attribute.path(path);
  const begin = command(
    "subvol",
    P("20300101-000000"),
    attribute.uuid(numberedUuid(5)),
    attribute.ctransid(1),
  );
  const write = (path: string, text = "evil") =>
    command("write", P(path), attribute.offset(0), attribute.data(text));
  const check = (bytes: Buffer, size = bytes.length) => {
    const it = streamCheck((name) => {
      if (name !== "20300101-000000") throw new Error(`name ${name}`);
    });
    let passed = 0;
    for (let end = size; end < bytes.length + size; end += size)
      passed = it.pass(bytes, passed, Math.min(end, bytes.length));
    it.finish();
    return bytes;
  };
  const end = command("end");
  const file = (name: string) => command("mkfile", P(name), attribute.ino(300));
  const link = (name: string, to: string) =>
    command("symlink", P(name), attribute.ino(301), attribute.pathLink(to));
  const node = (name: string) =>
    command("mknod", P(name), attribute.ino(302), attribute.rdev(0x700), attribute.mode(0o60600));

  test("real streams pass unchanged, in pieces of any size, full and incremental, of protocol 1 and 2", () => {
    const { source, a } = pair();
    const random = generator(11);
    const received = join(a.path, "received");
    mkdirSync(received);
    sh(
      `mkdir -p "$1/snapshot"; btrfs -q subvolume snapshot -r "$1" "$1/snapshot/20300101-000000" >/dev/null; btrfs send -q "$1/snapshot/20300101-000000" | btrfs receive -q "$2"; mv "$2"/* "$2/first"`,
      source,
      received,
    );
    const parts = [[], ["--proto", "2", "--compressed-data"]].map((how) =>
      streamOf(join(source, "snapshot/20300101-000000"), null, ...how),
    );
    sh(
      `cd "$1"; mkdir d e; ln -s /etc d/link; mkfifo d/fifo; mv plain/symlink plain/was-link; echo file >plain/symlink; mv plain/deep other-deep; ln -s elsewhere plain/deep; rm -r empty; echo now-a-file >empty; mv plain/fifo e/`,
      source,
    );
    for (let i = 0; i < 5; i++) change(source, random);
    sh(
      `mv "$1/snapshot/20300101-000000" "$1/snapshot/base"; btrfs -q subvolume snapshot -r "$1" "$1/snapshot/20300101-000000" >/dev/null`,
      source,
    );
    for (const how of [[], ["--proto", "2"]])
      parts.push(
        streamOf(join(source, "snapshot/20300101-000000"), join(source, "snapshot/base"), ...how),
      );
    for (const bytes of parts)
      for (const size of [bytes.length, 65536, 4096 + 1, ...(bytes.length < 5e6 ? [7] : [])])
        expect(check(bytes, size).equals(bytes)).toBe(true);
  });

  const bad: Record<string, Buffer[]> = {
    "no header": [Buffer.from("not a stream at all, but long enough")],
    "another protocol": [stream(begin, end).fill(3, 13, 14)],
    "protocol 0": [stream(begin, end).fill(0, 13, 14)],
    "an unknown command": [22, 26, 27, 255, 65535, 0].map((code) =>
      stream(begin, command(code, P("x")), end),
    ),
    "a command that does not say its attributes": [
      stream(begin, command("write", P("x")), end),
      stream(begin, command("rename", P("x")), end),
      stream(command("subvol", P("20300101-000000")), end),
    ],
    "a foreign attribute": [
      stream(begin, command("unlink", P("x"), attribute.pathTo("y")), end),
      stream(begin, command("end", P("x"))),
    ],
    "an attribute twice": ["../y", "y"].map((again) =>
      stream(begin, command("mkfile", P("x"), attribute.ino(1), P(again)), end),
    ),
    "an attribute of no type": [
      stream(begin, command("mkfile", P("x"), Buffer.from([0, 0, 0, 0])), end),
      stream(begin, command("mkfile", P("x"), Buffer.from([99, 0, 0, 0])), end),
    ],
    "an attribute longer than its command": [
      stream(begin, command("mkfile", Buffer.from([15, 0, 255, 255, 65])), end),
      stream(begin, command("mkfile", Buffer.from([15])), end),
    ],
    "a command that is too long": [
      Buffer.concat([
        stream(begin),
        Buffer.from([0, 0, 16, 0, 15, 0, 0, 0, 0, 0]),
        Buffer.alloc(1 << 20),
      ]),
    ],
    "absolute paths": ["/etc/passwd", "/", "//x"].flatMap((path) => [
      stream(begin, file(path), end),
      stream(begin, command("rename", P("x"), attribute.pathTo(path)), end),
    ]),
    "dots, and names that are empty": [
      "..",
      "../x",
      "a/../../x",
      "a/..",
      ".",
      "./x",
      "a/./b",
      "a//b",
      "a/",
    ].flatMap((path) => [
      stream(begin, file(path), end),
      stream(begin, write(path), end),
      stream(begin, command("rename", P("x"), attribute.pathTo(path)), end),
      stream(begin, command("link", P("x"), attribute.pathLink(path)), end),
      stream(begin, command("rmdir", P(path)), end),
      stream(begin, command("chmod", P(path), attribute.mode(0o777)), end),
    ]),
    "a NUL in a path": [stream(begin, file("a\0b"), end), stream(begin, file("\0"), end)],
    "the subvolume itself": [
      stream(begin, command("rename", P(""), attribute.pathTo("x")), end),
      stream(begin, command("rename", P("x"), attribute.pathTo("")), end),
      stream(begin, command("rmdir", P("")), end),
    ],
    "no subvolume": [stream(end), stream(file("x"), end), stream(write("x"), begin, end)],
    "more than one subvolume": [
      stream(begin, begin, end),
      stream(
        begin,
        command(
          "snapshot",
          P("20300101-000001"),
          attribute.uuid(numberedUuid(6)),
          attribute.ctransid(1),
          attribute.cloneUuid(numberedUuid(5)),
          attribute.cloneCtransid(1),
        ),
        end,
      ),
    ],
    "something after its end": [
      Buffer.concat([stream(begin, end), stream(begin, end)]),
      Buffer.concat([stream(begin, end), Buffer.from([0])]),
      stream(begin, end, end),
    ],
    "another name": ["x", "20300101-000001", "../20300101-000000", "20300101-000000/x", ""].map(
      (name) =>
        stream(
          command("subvol", P(name), attribute.uuid(numberedUuid(5)), attribute.ctransid(1)),
          end,
        ),
    ),
    "no end": [stream(begin, file("x")), stream(begin, end).subarray(0, -1), stream()],
    "encoded data that receive cannot unpack safely": [
      [16, 16, 0, 3],
      [4096, 32768, 0, 1],
      [131073, 131073, 0, 1],
      [4096, 4096, 1, 2],
      [0, 0, 0, 1],
      [4096, 4096, 0, 0],
      [4096, 4096, 0, 8],
    ].map(([length, bytes, offset, how]) =>
      stream(
        begin,
        file("x"),
        command(
          "encoded_write",
          P("x"),
          attribute.offset(0),
          attribute.unencodedFileLength(bytes as number),
          attribute.unencodedLength(length as number),
          attribute.unencodedOffset(offset as number),
          attribute.compression(how as number),
          attribute.dataOf2("x"),
        ),
        end,
      ).fill(2, 13, 14),
    ),
    "cloning from elsewhere": [numberedUuid(7), numberedUuid(2)].map((from) =>
      stream(
        begin,
        file("x"),
        command(
          "clone",
          attribute.offset(0),
          attribute.cloneLength(4096),
          P("x"),
          attribute.cloneUuid(from),
          attribute.cloneCtransid(1),
          attribute.clonePath("secret"),
          attribute.cloneOffset(0),
        ),
        end,
      ),
    ),
  };
  for (const [what, streams] of Object.entries(bad))
    test(`is refused: ${what}`, () => {
      for (const bytes of streams)
        for (const size of [bytes.length || 1, 1])
          if (bytes.length < 1e6 || size > 1) expect(() => check(bytes, size)).toThrow();
    });

  /** What the bytes alone do not tell: they make a link or a device, or the parent has one, and go through it. The kernel refuses these. */
  const beyond: Record<string, Buffer[]> = {
    "writing through a link": [
      stream(begin, link("l", "../x"), write("l"), end),
      stream(begin, link("l", ".."), write("l/x"), end),
      stream(
        begin,
        link("l", ".."),
        command("rename", P("l/20260101-000000"), attribute.pathTo("l/gone")),
        end,
      ),
      stream(begin, link("l", ".."), command("rmdir", P("l/x")), end),
      stream(begin, link("l", "x"), command("chmod", P("l"), attribute.mode(0o777)), end),
      stream(begin, link("l", "x"), file("l"), end),
      stream(begin, link("l", "x"), command("truncate", P("l"), attribute.size(0)), end),
      stream(begin, link("l", ".."), file("l/x"), end),
      stream(begin, link("l", ".."), command("link", P("x"), attribute.pathLink("l/secret")), end),
    ],
    "writing through a link that moved": [
      stream(
        begin,
        link("l", "../x"),
        command("rename", P("l"), attribute.pathTo("m")),
        write("m"),
        end,
      ),
      stream(
        begin,
        link("l", "../x"),
        command("link", P("m"), attribute.pathLink("l")),
        write("m"),
        end,
      ),
      stream(
        begin,
        command("mkdir", P("d"), attribute.ino(1)),
        link("d/l", ".."),
        command("rename", P("d"), attribute.pathTo("e")),
        write("e/l/x"),
        end,
      ),
      stream(
        begin,
        file("x"),
        write("x"),
        command("rename", P("x"), attribute.pathTo("y")),
        link("x", "../z"),
        write("x"),
        end,
      ),
    ],
    "a rename between two names of one link, which does nothing": [
      stream(
        begin,
        link("l", "/x"),
        command("link", P("m"), attribute.pathLink("l")),
        command("rename", P("l"), attribute.pathTo("m")),
        write("l/y"),
        end,
      ),
      stream(
        begin,
        node("d"),
        command("link", P("e"), attribute.pathLink("d")),
        command("rename", P("d"), attribute.pathTo("e")),
        write("d"),
        end,
      ),
    ],
    "writing to a device": [
      stream(begin, node("d"), write("d"), end),
      stream(begin, node("d"), command("rename", P("d"), attribute.pathTo("e")), write("e"), end),
      stream(begin, node("d"), command("truncate", P("d"), attribute.size(0)), end),
      stream(
        begin,
        command("mkfifo", P("d"), attribute.ino(1), attribute.rdev(0), attribute.mode(0o10600)),
        write("d"),
        end,
      ),
    ],
    "cloning through a link": [
      stream(
        begin,
        file("x"),
        link("l", "/etc/shadow"),
        command(
          "clone",
          attribute.offset(0),
          attribute.cloneLength(4096),
          P("x"),
          attribute.cloneUuid(numberedUuid(5)),
          attribute.cloneCtransid(1),
          attribute.clonePath("l"),
          attribute.cloneOffset(0),
        ),
        end,
      ),
    ],
  };

  test("gets through no link and to no device, neither its own nor its parent's", async () => {
    const it = await server();
    const image = join(it.tools, "disk");
    const outside = join(it.home, "x");
    sh(`truncate -s 1M "$1"`, image);
    const loop = sh(`losetup -f --show "$1"`, image);
    try {
      const minor = Number(sh(`stat -c %T "$1" | sed 's/^/0x/'`, loop));
      writeFileSync(outside, "mine");
      const receive = (name: string) =>
        sent("receive", "-q", it.home, it.fsid, "", "1", "", "", "", "", "").replaceAll(
          "20300101-000000",
          name,
        );
      const links = command("mkdir", P("d"), attribute.ino(310));
      const parts = [
        links,
        file("d/file"),
        link("l", "/"),
        link("d/up", "../.."),
        link("d/x", outside),
        command(
          "mkfifo",
          P("d/fifo"),
          attribute.ino(1),
          attribute.rdev(0),
          attribute.mode(0o10600),
        ),
        command(
          "mknod",
          P("null"),
          attribute.ino(302),
          attribute.rdev((7 << 8) | minor),
          attribute.mode(0o60600),
        ),
      ];
      const begun = (name: string, own: string) =>
        command("subvol", P(name), attribute.uuid(own), attribute.ctransid(1));
      expect(
        (
          await it.guard(receive("20300100-000000"), {
            input: stream(begun("20291231-000000", numberedUuid(6)), ...parts, end),
          })
        ).status,
      ).toBe(0);
      const snapshot = command(
        "snapshot",
        P("20300101-000000"),
        attribute.uuid(numberedUuid(5)),
        attribute.ctransid(1),
        attribute.cloneUuid(numberedUuid(6)),
        attribute.cloneCtransid(1),
      );
      const rename = (from: string, to: string) => command("rename", P(from), attribute.pathTo(to));
      const clone = (from: string) =>
        command(
          "clone",
          attribute.offset(0),
          attribute.cloneLength(4096),
          P("d/file"),
          attribute.cloneUuid(numberedUuid(6)),
          attribute.cloneCtransid(1),
          attribute.clonePath(from),
          attribute.cloneOffset(0),
        );
      const through = [
        [write("l/etc/x")],
        [write("d/up/x")],
        [write("d/x")],
        [write("null")],
        [rename("d", "e"), write("e/up/x")],
        [rename("l", "m"), write("m/x")],
        [clone("d/up/x")],
        [command("truncate", P("d/x"), attribute.size(0))],
        [command("chmod", P("d/x"), attribute.mode(0o777))],
        [command("rmdir", P("l/x"))],
      ];
      const all = [
        ...Object.values(beyond).flat(),
        ...through.map((commands) => stream(snapshot, ...commands, end)),
      ];
      const others = () =>
        sh(
          `cd "$1"; find . -path ./laptop/home -prune -o -type f -exec sha256sum {} + | sort`,
          it.b.path,
        );
      const before = others();
      const disk = sh(`sha256sum <"$1"`, loop);
      // A FIFO that the stream writes to would wait for ever: its input ends, and with it the session.
      for (const input of all.filter(
        (bytes) => !bytes.includes("fifo") && !bytes.includes(Buffer.from([6, 0, 0x10])),
      )) {
        await it.guard(receive("20300101-000000"), {
          input: Buffer.from(
            input
              .toString("latin1")
              .replaceAll("\x00\x07\0\0", `${String.fromCharCode(minor)}\x07\0\0`),
            "latin1",
          ),
        });
        sh(
          `cd "$1"; [ ! -e 20300101-000000 ] || { btrfs property set -f -ts 20300101-000000 ro false; btrfs -q subvolume delete 20300101-000000 >/dev/null; }`,
          it.home,
        );
        expect([readFileSync(outside, "utf8"), sh(`sha256sum <"$1"`, loop)]).toEqual([
          "mine",
          disk,
        ]);
      }
      expect(others()).toBe(before);
      expect(snapshotNames(it.home).sort()).toEqual(["20291231-000000", it.name].sort());
    } finally {
      sh(`losetup -d "$1"`, loop);
    }
  });

  test("does harm to a plain receive, and none through the guard", async () => {
    const it = await server();
    const device = join(it.tools, "disk");
    sh(`truncate -s 1M "$1"`, device);
    const loop = sh(`losetup -f --show "$1"`, device);
    try {
      const minor = Number(sh(`stat -c %T "$1" | sed 's/^/0x/'`, loop));
      const secret = subvolume(join(it.b.path, "others"));
      writeFileSync(join(secret, "file"), "secret of others");
      sh(`btrfs -q subvolume snapshot -r "$1" "$2/victim" >/dev/null`, secret, it.b.path);
      const victim = join(it.home, "writable.txt");
      const disk = command(
        "mknod",
        P("disk"),
        attribute.ino(300),
        attribute.rdev((7 << 8) | minor),
        attribute.mode(0o60600),
      );
      const attacks: [string, Buffer, () => boolean, () => void][] = [
        [
          "a path out of it",
          stream(begin, file("../../escaped"), end),
          () => existsSync(join(it.mine, "escaped")),
          () => rmSync(join(it.mine, "escaped")),
        ],
        [
          "a link out of it",
          stream(begin, link("l", "../writable.txt"), write("l"), end),
          () => readFileSync(victim, "utf8").startsWith("evil"),
          () => writeFileSync(victim, "mine"),
        ],
        [
          "a sibling's name",
          stream(
            begin,
            link("l", ".."),
            command("rename", P(`l/${it.name}`), attribute.pathTo("l/20300101-000000/gone")),
            end,
          ),
          () => !existsSync(join(it.home, it.name)),
          () => {},
        ],
        [
          "a device",
          stream(begin, disk, write("disk"), end),
          () => sh(`head -c 4 "$1"`, loop) === "evil",
          () => sh(`printf '\\0\\0\\0\\0' | dd of="$1" conv=notrunc 2>/dev/null; sync "$1"`, loop),
        ],
      ];
      writeFileSync(victim, "mine");
      const chain = JSON.parse(
        sh(`sed -n 2p "$1"`, join(it.home, ".btrfs-backup.json")).slice(5),
      ) as Record<string, unknown>;
      const receive = sent(
        "receive",
        "-q",
        it.home,
        it.fsid,
        "",
        "1",
        "",
        '{"/": 1',
        ',"": ',
        '{"receiving":"20300101-000000",',
        JSON.stringify(chain).slice(1),
      );
      const clean = sent(
        "discard",
        it.home,
        it.fsid,
        "",
        "20300101-000000",
        '{"/": 1',
        ',"": ',
        JSON.stringify(chain),
      );
      for (const [what, bytes, done, undo] of attacks) {
        const result = await it.guard(receive, { input: bytes, env: {} });
        expect([what, result.status, done()]).toEqual([
          what,
          what === "a path out of it" ? 65 : 1,
          false,
        ]);
        expect(result.stderr).toMatch(
          what === "a path out of it"
            ? /^btrfs-backup guard: refused: [^\n]+\n$/
            : /Too many levels of symbolic links|Permission denied/,
        );
        expect((await it.guard(clean)).status).toBe(0);
        expect(existsSync(join(it.home, "20300101-000000"))).toBe(false);
        if (what === "a sibling's name") continue; // it is read-only: a plain receive fails as well
        spawnSync("btrfs", ["receive", "-q", it.home], { input: bytes });
        expect([what, done()]).toEqual([what, true]);
        undo();
        sh(`btrfs -q subvolume delete "$1/20300101-000000" >/dev/null`, it.home);
      }
      // A good one is received, as nothing but what was announced.
      const good = stream(begin, file("x"), write("x", "hello"), end);
      for (const change of [
        {
          input: stream(
            command(
              "subvol",
              P("20300101-000009"),
              attribute.uuid(numberedUuid(5)),
              attribute.ctransid(1),
            ),
            end,
          ),
        },
        { input: good.subarray(0, -10) },
      ]) {
        expect((await it.guard(receive, change)).status).toBe(65);
        expect((await it.guard(clean)).status).toBe(0);
      }
      expect(snapshotNames(it.home)).toEqual([it.name]);
      const result = await it.guard(receive, { input: good });
      expect([result.status, result.stderr]).toEqual([0, ""]);
      expect(readFileSync(join(it.home, "20300101-000000/x"), "utf8")).toBe("hello");
      for (const line of it.received().trim().split("\n")) expect(line).toBe("receive -qC ."); // in a chroot as well
      // Without a record there is no announcement, and the name is taken all the same.
      expect(
        (
          await it.guard(sent("receive", "-q", it.home, it.fsid, "", "1", "", "", "", "", ""), {
            input: good,
          })
        ).stderr,
      ).toContain('refused: the subvolume "20300101-000000"');
      // It stands there now: neither again, nor removed, nor built on what is not in the folder.
      expect((await it.guard(receive, { input: good })).status).toBe(65);
      expect((await it.guard(clean)).status).toBe(65);
      const other = [...subvolumes(it.b.path)].find(([name]) => name === "victim")?.[1]
        .uuid as string;
      const on = (parent: string, own = numberedUuid(8)) =>
        stream(
          command(
            "snapshot",
            P("20300102-000000"),
            attribute.uuid(own),
            attribute.ctransid(1),
            attribute.cloneUuid(parent),
            attribute.cloneCtransid(1),
          ),
          end,
        );
      const next = receive.replace("20300101-000000", "20300102-000000");
      expect((await it.guard(next, { input: on(other) })).stderr).toContain("the parent");
      expect((await it.guard(clean.replace("20300101-000000", "20300102-000000"))).status).toBe(0);
      expect((await it.guard(next, { input: on(numberedUuid(5)) })).status).toBe(0);
      // Of two with one UUID it is not known which would be received on.
      sh(`btrfs -q subvolume snapshot -r "$1/20300101-000000" "$1/twin" >/dev/null`, it.home);
      expect(
        (
          await it.guard(receive.replace("20300101-000000", "20300103-000000"), {
            input: Buffer.from(
              on(numberedUuid(5), numberedUuid(9))
                .toString("latin1")
                .replace("20300102", "20300103"),
              "latin1",
            ),
          })
        ).stderr,
      ).toContain("not alone");
      expect(treeDigest(join(it.home, "20300102-000000"))).toBe(
        treeDigest(join(it.home, "20300101-000000")),
      );
    } finally {
      sh(`losetup -d "$1"`, loop);
    }
  });

  test("that grows on the way, or is no zstd, is refused as well", async () => {
    const it = await server();
    const receive = sent("receive", "-q", it.home, it.fsid, "3", "1", "", "", "", "", "");
    const zipped = (bytes: Buffer) => spawnSync("zstd", ["-q", "-c"], { input: bytes }).stdout;
    expect(
      (await it.guard(receive, { input: zipped(stream(begin, file("../x"), end)) })).status,
    ).toBe(65);
    expect(
      (await it.guard(receive, { input: zipped(stream(begin, file("x"), end)).subarray(0, -3) }))
        .status,
    ).toBe(65);
    expect((await it.guard(receive, { input: stream(begin, end) })).status).toBe(65);
    expect(existsSync(join(it.mine, "x"))).toBe(false);
    expect(
      [...subvolumes(it.home).values()].every(
        ({ readonly, receivedUuid }) => readonly || receivedUuid === null,
      ),
    ).toBe(true);
  });
});

test("a guard without a path, or with a path that is relative, is a mistake in authorized_keys", async () => {
  for (const args of [[], ["--path", "laptop"], ["--path", "/x", "/y"], ["--path", "/x", "--rsh"]])
    expect((await expectRun(2, ["guard", ...args])).stderr).toMatch(
      /--path|too many|unknown option/,
    );
  // Typed by hand, it says what it is for.
  const { stderr } = await expectRun(65, ["guard", "--path", temporaryDirectory()]);
  expect(stderr).toContain("btrfs-backup help keys");
});

test("a folder in a store cannot be read, replaced or emptied by who may only add", async () => {
  const it = await server();
  const [object = ""] = readdirSync(it.raw).filter((file) => file.endsWith(".btrfs"));
  const before = state(it.b.path);
  const prefix = "";
  for (const text of [
    sent("commit", it.raw, it.fsid, prefix, object, "0".repeat(64), "4"),
    sent("drop", it.raw, it.fsid, prefix, object),
    sent("drop", it.raw, it.fsid, prefix, `${object}.sha256`),
    sent("fetch", it.raw, it.fsid, "", "1", object),
  ])
    expect((await it.guard(text, { input: Buffer.from("evil") })).status).toBe(65);
  expect(state(it.b.path)).toBe(before);
  expect(
    (
      await it.guard(sent("store", it.raw, it.fsid, prefix, object, "1", ""), {
        input: Buffer.from("evil"),
      })
    ).status,
  ).toBe(0);
  expect(
    (await it.guard(sent("commit", it.raw, it.fsid, prefix, object, "0".repeat(64), "4"))).status,
  ).toBe(65);
  expect((await it.guard(sent("drop", it.raw, it.fsid, prefix, `.${object}.part`))).status).toBe(0);
  expect(state(it.b.path).replace(/^.*\n/, "")).toBe(before.replace(/^.*\n/, ""));
});

test("an added stream does not stand for the data of one that is stored, and none is overwritten however sessions meet", async () => {
  const it = await server();
  const [object = ""] = readdirSync(it.raw).filter((file) => file.endsWith(".btrfs"));
  const again = object.replace(/^\d{8}/, "20200101");
  expect(
    (
      await it.guard(sent("store", it.raw, it.fsid, "", again, "1", ""), {
        input: Buffer.from("evil"),
      })
    ).status,
  ).toBe(0);
  expect(
    (await it.guard(sent("commit", it.raw, it.fsid, "", again, "0".repeat(64), "4"))).stderr,
  ).toContain("is stored already");
  // The verb itself looks again when it has the lock.
  sh(`printf evil >"$1/.$2.part"`, it.raw, object);
  const result = spawnSync(
    "sh",
    [
      "-c",
      sent(
        "commit",
        it.raw,
        it.fsid,
        "",
        object,
        "0".repeat(64),
        "4",
        "",
        "",
        object.split("_")[4] as string,
      ),
    ],
    { encoding: "utf8" },
  );
  expect([result.status, result.stderr]).toEqual([76, `./${object} is there\n`]);
  await expectRun(0, ["verify", `raw://${it.raw}`]);
});

test("names of the program's own, and what would show in an administrator's terminal, are refused", async () => {
  const it = await server();
  for (const name of [
    ".outstanding_transfers",
    ".btrfs-backup.json.new",
    ".btrfs-backup.x.lock",
    OBJECT,
    `.${OBJECT}.part`,
  ])
    expect((await it.guard(sent("create", join(it.home, name), it.fsid, ""))).stderr).toContain(
      "has a name that this program uses",
    );
  const now = { chain: {}, standing: [], entries: new Set<string>(), prefix: "" };
  for (const evil of ["\x1b[2J", "\x9b2J", "\u202e", "a\nb", "\x7f"])
    for (const owner of [
      { uuid: evil, host: "h", path: "/p" },
      { uuid: "u", host: evil, path: "/p" },
      { uuid: "u", host: "h", path: evil },
    ])
      expect(() => guardedRecord(JSON.stringify({ owner }), now, false)).toThrow();
});

test("a UUID that is on the filesystem already is nobody's new one, nor a parent that is not alone", async () => {
  const it = await server();
  const own = [...subvolumes(it.home).values()][0] as { uuid: string; receivedUuid: string };
  const P = attribute.path;
  const receive = sent("receive", "-q", it.home, it.fsid, "", "1", "", "", "", "", "");
  for (const taken of [own.uuid, own.receivedUuid])
    expect(
      (
        await it.guard(receive, {
          input: stream(
            command("subvol", P("20300101-000000"), attribute.uuid(taken), attribute.ctransid(1)),
            command("end"),
          ),
        })
      ).stderr,
    ).toContain("which is not new");
  // Another folder has the same data: receive could take that one.
  for (const parent of [own.uuid, own.receivedUuid])
    expect(
      (
        await it.guard(receive, {
          input: stream(
            command(
              "snapshot",
              P("20300101-000000"),
              attribute.uuid(numberedUuid(8)),
              attribute.ctransid(1),
              attribute.cloneUuid(parent),
              attribute.cloneCtransid(1),
            ),
            command("end"),
          ),
        })
      ).stderr,
    ).toContain("not in the folder, or not alone");
  expect(snapshotNames(it.home)).toEqual([it.name]);
});

test("filesystems that are not btrfs have nothing to receive on", async () => {
  const { guarded, url } = await sshServer();
  const { source } = pair();
  const directory = temporaryDirectory();
  fill(join(filesystem().path));
  expect(
    (await expectRun(1, [...guarded("--path", directory), source, url(join(directory, "x"))]))
      .stderr,
  ).toContain("not on btrfs");
});
