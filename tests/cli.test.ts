// The command line: what is wrong is told in one line, with exit status 2, and nothing is done.

import { describe, expect, test } from "bun:test";
import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import type { ArgsDef } from "citty";
import { COMMANDS } from "../btrfs-backup.ts";
import {
  events,
  expectRun,
  filesystem,
  nextSecond,
  pair,
  ROOT,
  run,
  sh,
  snapshotNames,
  sshServer,
  subvolume,
  temporaryDirectory,
} from "./support/rig.ts";

test("usage errors are one line, exit 2, and nothing is done", async () => {
  const { source, snapshots, destination, a } = pair();
  for (const plain of ["plain", "a plain # Z"]) mkdirSync(join(a.path, plain));
  const off = temporaryDirectory();
  const wrong: [string[], string][] = [
    [["--json", "list", source], "the command comes first: btrfs-backup list …"],
    [
      ["--num-snapshosts", "3", source],
      "unknown option --num-snapshosts; did you mean --num-snapshots?",
    ],
    [["--verbose", "info", source], "--verbosity"],
    [["--num", "3", source], "--num can mean --num-snapshots or --num-backups"],
    [["--dry", source], "unknown option --dry"],
    [["--num-snap", "many", source], '"many" is not a retention policy'],
    [["--compress", "gzip", source], '"gzip" is no compression'],
    [["--rate-limit", "fast", source], '"fast" is not a rate'],
    [["--protocol", "9", source], "--protocol is 1 or 2"],
    [["--full-every", "x", source], '"x" says not when a chain ends'],
    [["-x", source], "unknown option -x"],
    [["-N"], "-N"],
    [["-N", "-1", source], "-N has no value: what follows it begins with a dash"],
    [["--num-snapshots", "-1", source], "--num-snapshots has no value: what follows"],
    [["-N-1", source], '"-1" is not a retention policy'],
    [["-N", "many", source], '"many" is not a retention policy'],
    [["-n", "3 3", source, destination], "twice"],
    [["--max-age", "3 days", source], "is not a duration"],
    [["-v", "loud", source], "--verbosity is one of"],
    [["--wait", "soon", source], "--wait takes a whole number"],
    [["-p", "a/b", source], "prefix"],
    [[], "btrfs-backup list /home"],
    [["lsit", source], 'there is no command lsit; did you mean "btrfs-backup list"?'],
    [["resotre", source, "/x"], 'did you mean "btrfs-backup restore"?'],
    [["status"], 'did you mean "btrfs-backup list"?'],
    [["help", "nonsense"], "nonsense"],
    [["--keep-daily", "7", source], "-n (at destinations)"],
    [[source, "nas:/path"], "write ssh://nas/path"],
    [[source, "root@nas:/path"], "write ssh://root@nas/path"],
    [[source, "nas:~/path"], "write ssh://nas/path"],
    [["-S"], "SOURCE is missing"],
    [[join(a.path, "plain"), destination], `not a subvolume: ${join(a.path, "plain")}`],
    [[join(a.path, "a plain # Z"), destination], `not a subvolume: ${join(a.path, "a plain # Z")}`],
    ...[source, a.path].map((source): [string[], string] => [
      ["-f", join(destination, "../snapshots"), source],
      "is not on the filesystem",
    ]),
    [[join(a.path, "none"), destination], "no such directory"],
    [[off, destination], `not on btrfs: ${off}`],
    [[source, "s3://bucket/x"], '"s3://" is no kind of location'],
    [[source, "ssh://host"], "is not of the form ssh://"],
    [["shell://cat", destination], "SOURCE cannot be a command"],
    [[source, "shell://"], "shell:// needs a command"],
    [["unpin", source], "say --all"],
    [["-f", off, source], "is not on the filesystem"],
  ];
  for (const [args, message] of wrong) {
    const { status, stderr, stdout } = await run(args);
    expect([args, status, stderr + stdout]).toEqual([args, 2, expect.stringContaining(message)]);
    if (args.length > 0) expect(stderr.trimEnd().split("\n").length).toBe(1);
  }
  expect([existsSync(snapshots), existsSync(destination)]).toEqual([false, false]);
});

test("help is a command as well, and no arguments get a few lines", async () => {
  const [help, restore, none] = [
    await run(["help", "run"]),
    await run(["help", "restore"]),
    await run([]),
  ];
  expect([help.status, restore.status]).toEqual([0, 0]);
  expect([help.stdout, restore.stdout]).toEqual([
    (await run(["--help"])).stdout,
    (await run(["restore", "--help"])).stdout,
  ]);
  expect([none.status, none.stdout, none.stderr.trimEnd().split("\n").length]).toEqual([2, "", 8]);
});

test("what 0.2 and 0.3.1 took is taken: unambiguous beginnings of their options, -C, and a sign before a number", async () => {
  const { source, snapshots, a } = pair();
  const beside = join(a.path, "beside");
  const old = [
    "--verb",
    "warning",
    "--no-prog",
    "--num-snap",
    "+2",
    "--num-b=1",
    "--snapshot-f",
    "snapshot",
  ];
  const { stderr } = await expectRun(0, [...old, source, "-C", beside]);
  expect(stderr).toBe("");
  for (let i = 0; i < 2; i++) {
    await nextSecond();
    await expectRun(0, [...old, source, "--skip-fs", beside]);
  }
  expect([snapshotNames(snapshots).length, snapshotNames(beside).length]).toEqual([2, 1]);
});

test("a path that is not UTF-8 is a usage error, and nothing is made under another name", () => {
  const { source, snapshots, a } = pair();
  const program = join(ROOT, "dist/btrfs-backup");
  writeFileSync(
    join(a.path, "arguments"),
    Buffer.concat([Buffer.from(`${a.path}/back`), Buffer.from([0xff])]),
  );
  for (const words of [
    `"$2" "$3/back"$'\\xff'`,
    `--metrics "$3/metrics"$'\\xff' "$2"`,
    `"$2"$'\\xff'`,
    `"$2" "@$3/arguments"`,
    `restore "$3" "$3/back"$'\\xff'`,
    `versions "$2/file"$'\\xff'`,
  ])
    expect(sh(`"$1" ${words} 2>&1 && exit 1; s=$?; echo "$s"`, program, source, a.path)).toMatch(
      /not UTF-8[^\n]*\n2$/,
    );
  expect(existsSync(snapshots)).toBe(false);
  expect(sh(`ls "$1"`, a.path)).toBe("arguments\nhome");
});

test("--help and --version answer on stdout", async () => {
  const { version } = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")) as {
    version: string;
  };
  expect((await expectRun(0, ["--version"], { how: "bun" })).stdout).toBe(
    `btrfs-backup ${version} (from source, Bun ${Bun.version})\n`,
  );
  // A build says what it was built from, where that is known: a tree can be unpacked from an archive, or belong to another user.
  const commit = sh(
    `cd "$1"; git -c safe.directory="$PWD" rev-parse --short=10 HEAD 2>/dev/null || echo "no commit"`,
    ROOT,
  );
  expect((await expectRun(0, ["--version"])).stdout).toBe(
    `btrfs-backup ${version} (${commit}, Bun ${Bun.version})\n`,
  );
  expect((await expectRun(0, ["--help"])).stdout).toContain("--num-backups");
  expect((await expectRun(0, ["unpin", "--help"])).stdout).toContain("--all");
  // All that there is, in a terminal's width, and the same words in the README.
  const { stdout: main } = await expectRun(0, ["--help"]);
  const lines = main.split("\n");
  expect(lines.length).toBeLessThanOrEqual(72);
  expect(lines.slice(4, 5)).toEqual(["Examples:"]);
  expect(lines.slice(5, 13).filter((line) => line.startsWith("  btrfs-backup ")).length).toBe(4);
  expect(main).toContain("\n      --dry-run ");
  expect(main).toContain("\n  help  ");
  expect(main).not.toContain("--skip-fs-checks");
  for (const [command, { args }] of Object.entries(COMMANDS)) {
    const isLong = Object.hasOwn(args as ArgsDef, "help-all");
    const { stdout } = await expectRun(0, [command, isLong ? "--help-all" : "--help"]);
    for (const line of stdout.split("\n"))
      expect([line.length <= 80, line]).toEqual([true, line.trimEnd()]);
    // Two commands to try, and how it ends; what the options take is explained.
    expect(stdout.match(/^ {2}(command=")?btrfs-backup .*\n {6}\S/gm)?.length).toBeGreaterThan(1);
    expect(stdout).toContain("\nExit status: 0: all is done");
    expect(stdout.includes("\nA POLICY is a number")).toBe(stdout.includes(" POLICY"));
    if (command !== "run") expect(main).toContain(`\n  ${command} `);
    const told = [...stdout.matchAll(/^ {2}(?:-\w, | {4})--([a-z-]+)/gm)].map(
      ([, option]) => option as string,
    );
    const options = Object.entries(args as ArgsDef).filter(([, { type }]) => type !== "positional");
    expect(told.toSorted()).toEqual(options.map(([option]) => option).sort());
  }
});

describe("errors say the next command", () => {
  test("a directory that is no subvolume becomes one by what is printed, and is backed up then", async () => {
    const { source, destination } = pair();
    const ann = join(source, "it's ann");
    mkdirSync(ann);
    writeFileSync(join(ann, "letter"), "dear");
    const { stderr } = await expectRun(2, [ann, destination]);
    expect(stderr).toContain(
      `not a subvolume: ${ann}; it is a directory in the subvolume ${source}.`,
    );
    const [, commands = ""] = /make a subvolume of it: (.*)/.exec(stderr) ?? [];
    sh(commands);
    await expectRun(0, [ann, destination]);
    const [name = ""] = snapshotNames(destination);
    expect(readFileSync(join(destination, name, "letter"), "utf8")).toBe("dear");
  });

  test("a key that is refused, and a host that is not known", async () => {
    const { source } = pair();
    const { options, url } = await sshServer();
    const elsewhere = url(join(temporaryDirectory(), "backup"));
    const authority = /^ssh:\/\/([^/]+)\//.exec(elsewhere)?.[1] as string;
    const other = join(temporaryDirectory(), "key");
    sh(`ssh-keygen -q -t ed25519 -N "" -f "$1"`, other);
    const withKey = options.map((option) =>
      option.startsWith("IdentityFile=") ? `IdentityFile=${other}` : option,
    );
    const refused = await expectRun(1, [...withKey, "--json", source, elsewhere]);
    const [, host = "", port = ""] = /^(.*):(\d+)$/.exec(authority) ?? [];
    expect(refused.stderr).toContain(
      `\n        give it the key of the user of this run: ssh-copy-id -p ${port} ${host}; or`,
    );
    expect(events(refused).find(({ event }) => event === "error")?.["advice"]).toContain(
      "ssh-copy-id",
    );
    await nextSecond();
    const unknown = options.map((option) =>
      option.startsWith("UserKnownHostsFile=") ? "UserKnownHostsFile=/dev/null" : option,
    );
    const asked = [...unknown, "--ssh-opt", "StrictHostKeyChecking=yes", source, elsewhere];
    expect((await expectRun(1, asked)).stderr).toContain(
      `compare the key: ssh -p ${port} ${host}\n`,
    );
  });

  test("a folder that is named one level too high", async () => {
    const { source, b, a } = pair();
    await expectRun(0, [source, join(b.path, "backup/home")]);
    const high = `${join(b.path, "backup")}; ${join(b.path, "backup/home")} has some`;
    expect((await expectRun(0, ["list", join(b.path, "backup")])).stdout).toContain(high);
    const restored = await expectRun(1, ["restore", join(b.path, "backup"), join(a.path, "new")]);
    expect(restored.stderr).toContain(`; ${join(b.path, "backup/home")} has some`);
    expect(existsSync(join(a.path, "new"))).toBe(false);
  });

  test("a directory that is not there", async () => {
    const { a } = pair();
    const missing = join(a.path, "no such");
    const { stderr } = await expectRun(1, ["restore", join(missing, "home"), join(a.path, "new")]);
    expect(stderr).toContain(
      `findmnt -T '${missing}'; if it is the right one: mkdir -p '${missing}'`,
    );
  });
});

test("where no destination can be one, no snapshot is taken; one that may be is enough", async () => {
  const { source, snapshots, destination, a } = pair();
  const here = join(a.path, "beside");
  const file = join(temporaryDirectory(), "file");
  writeFileSync(file, "");
  for (const wrong of [[here], [here, `raw://${a.path}/streams`], [join(file, "backup")]])
    expect([(await run([source, ...wrong])).status, snapshotNames(snapshots)]).toEqual([1, []]);
  // A disk that is known to come and go may come later; and so may a host.
  await expectRun(0, ["--optional", here, source, here]);
  expect(snapshotNames(snapshots).length).toBe(1);
  await nextSecond();
  await expectRun(1, [source, here, destination]);
  expect([snapshotNames(snapshots).length, snapshotNames(destination).length]).toEqual([2, 2]);
  await nextSecond();
  await expectRun(1, [source, "ssh://127.0.0.1:1/backup"]);
  expect(snapshotNames(snapshots).length).toBe(3);
});

test("the first run of a source says where its snapshots are, and what to do with them; later ones do not", async () => {
  const { source, snapshots, destination } = pair();
  const first = await expectRun(0, [source, destination]);
  expect(first.stderr).toContain(`The snapshots of ${source} are in ${snapshots}: `);
  const [, list = "", restore = ""] =
    /Next: btrfs-backup (list .*?); .*; btrfs-backup (restore .*) NEW/.exec(first.stderr) ?? [];
  const [name = ""] = snapshotNames(snapshots);
  expect((await expectRun(0, list.split(" "))).stdout).toContain(name);
  await expectRun(0, [...restore.split(" "), `${source}.restored`]);
  await nextSecond();
  expect((await expectRun(0, [source, destination])).stderr).not.toContain("Next: ");
});

test("deno.json imports what package.json pins", () => {
  const { dependencies } = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")) as {
    dependencies: Record<string, string>;
  };
  const { imports } = JSON.parse(readFileSync(join(ROOT, "deno.json"), "utf8")) as {
    imports: Record<string, string>;
  };
  for (const target of Object.values(imports))
    expect(
      Object.entries(dependencies).some(([name, version]) =>
        target.startsWith(`npm:${name}@${version}`),
      ),
    ).toBe(true);
});

test("the manual names the versions of the packages that package.json pins", () => {
  const { dependencies } = JSON.parse(readFileSync(join(ROOT, "package.json"), "utf8")) as {
    dependencies: Record<string, string>;
  };
  const words = Object.entries(dependencies)
    .filter(([name]) => name !== "bun")
    .map(([name, version]) => `${name}@${version}`);
  expect(readFileSync(join(ROOT, "scripts/manual/installing.md"), "utf8")).toContain(
    `bun add ${words.join(" ")}`,
  );
});

test("argument files are read as 0.3.1 read them", async () => {
  const { source, snapshots, destination } = pair();
  const directory = temporaryDirectory();
  mkdirSync(join(directory, "more"));
  writeFileSync(
    join(directory, "main"),
    `# a comment\n\n   -q\n  --num-snapshots 1\n-p   two words-\n@more/rest\n`,
  );
  writeFileSync(join(directory, "more/rest"), `@../dests\n--json\n`);
  writeFileSync(join(directory, "dests"), `${destination}\n`);
  const result = await expectRun(0, [source, `@${join(directory, "main")}`]);
  expect(result.stdout).toContain('"event":"summary"');
  expect(snapshotNames(snapshots, "two words-").length).toBe(1);
  expect(snapshotNames(destination, "two words-").length).toBe(1);
  writeFileSync(join(directory, "more/rest"), `@../main\n`);
  const loop = await expectRun(2, [`@${join(directory, "main")}`]);
  expect(loop.stderr).toContain(
    `${join(directory, "main")} -> ${join(directory, "more/rest")} -> ${join(directory, "main")}`,
  );
  expect((await expectRun(2, ["@/no/such/file"])).stderr).toContain("/no/such/file");
});

test("a top-level subvolume, and one mounted by itself, can be SOURCE", async () => {
  const [a, b] = [filesystem(), filesystem()];
  sh(`echo text >"$1/file"`, a.path);
  await expectRun(0, [a.path, join(b.path, "top")]);
  expect(
    readFileSync(
      join(b.path, "top", snapshotNames(join(b.path, "top"))[0] as string, "file"),
      "utf8",
    ),
  ).toBe("text\n");
  const home = subvolume(join(a.path, "@home"));
  sh(`echo home >"$1/file"`, home);
  const mounted = temporaryDirectory();
  sh(`mount -o subvol=@home "$(findmnt -no SOURCE "$1")" "$2"`, a.path, mounted);
  await expectRun(0, [mounted, join(b.path, "home")]);
  expect(snapshotNames(join(home, "snapshot")).length).toBe(1);
  expect(snapshotNames(join(b.path, "home")).length).toBe(1);
  // Its snapshots can stand outside of it, too.
  await expectRun(0, ["-S", "-T", "-f", join(mounted, "other"), mounted]);
  sh(`umount "$1"`, mounted);
});

test("a verb's script holds nothing that a login shell could trip over, and 0600 is what is written", async () => {
  const { source, snapshots, destination } = pair();
  await expectRun(0, [source, destination]);
  for (const folder of [snapshots, destination]) {
    expect(sh(`stat -c %a "$1"`, folder)).toBe("700");
    expect(sh(`cd "$1"; stat -c %a .btrfs-backup* | sort -u`, folder)).toBe("600");
  }
});

test("a short option takes its value behind a =, as it always did, and nobody has to read the events", async () => {
  const { source, snapshots, destination } = pair();
  await expectRun(0, ["-p=x-", "-n=3", source, destination]);
  expect(snapshotNames(snapshots, "x-").length).toBe(1);
  expect(
    sh(
      `set +e; "$1" btrfs-backup.ts -q --json "$2" >/dev/full; echo $?`,
      join(ROOT, "node_modules/.bin/bun"),
      source,
    ),
  ).toBe("1");
});
