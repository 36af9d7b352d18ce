// Nobody is believed about himself: what another host, a record that others can write, a login, a key in
// gpg's reach or a guarded key says decides neither what runs here, nor what a person's terminal does.

import { describe, expect, test } from "bun:test";
import { spawn } from "node:child_process";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import {
  damage,
  events,
  expectRun,
  filesystem,
  gpgKey,
  pair,
  ROOT,
  run,
  sh,
  snapshotAs,
  snapshotNames,
} from "./support/rig.ts";
import {
  type Options,
  type Result,
  sshServer,
  start,
  subvolume,
  subvolumes,
  temporaryDirectory,
  waitFor,
} from "./support/rig.ts";
import { fsidOf, sent } from "./support/wire.ts";
import { day } from "./support/names.ts";

const recordIn = (folder: string) => join(folder, ".btrfs-backup.json");

/** A record as the program writes one. */
const recordOf = (chain: object, prefix = "") =>
  `{"/": 1\n,${JSON.stringify(prefix)}: ${JSON.stringify(chain)}\n}\n`;
const knowing = (...locations: string[]) =>
  recordOf({
    destinations: locations.map((location) => ({
      location,
      filesystem: null,
      pin: null,
      last: null,
    })),
  });

type Trap = {
  readonly commands: string[];
  readonly locations: string[];
  readonly sprung: () => string[];
  readonly folder: string;
};
/**
 * Destinations for a record: commands that leave a file, and a folder, a folder that is not there, and a store
 * here, which tell whether they were read.
 */
async function trap(): Promise<Trap> {
  const { path } = filesystem({ mount: "strictatime" });
  const [folder, store, missing] = [
    join(path, "folder"),
    join(path, "store"),
    join(path, "missing"),
  ];
  const other = subvolume(join(filesystem().path, "other"));
  writeFileSync(join(other, "file"), "x");
  await expectRun(0, [other, folder, `raw://${store}`]);
  const files = temporaryDirectory();
  const commands = [
    `rclone://:webdav,url="http://127.0.0.1:9/",bearer_token_command="touch ${files}/rclone":y`,
    `shell://touch ${files}/shell`,
  ];
  const places = [folder, store];
  for (const place of places) sh(`touch -a -d @1000000000 "$1"`, place);
  const before = places.map((place) => readdirSync(place).sort().join());
  for (const place of places) sh(`touch -a -d @1000000000 "$1"`, place);
  const gone = (path: string) => (sh(`rm -rf "$1"`, path), path);
  const sprung = () => [
    ...readdirSync(files).map((name) => (gone(join(files, name)), `${name} ran`)),
    ...(existsSync(missing) ? [`${missing} was made`] : []),
    ...places.flatMap((place) =>
      Math.round(statSync(place).atimeMs) === 1e12 ? [] : [`${place} was read`],
    ),
    ...places.flatMap((place, i) =>
      sh(`ls -A "$1" | LC_ALL=C sort | paste -sd,; touch -a -d @1000000000 "$1"`, place) ===
      before[i]
        ? []
        : [`${place} has changed`],
    ),
  ];
  return { commands, locations: [folder, `raw://${store}`, missing, ...commands], sprung, folder };
}

/** A source with a snapshot, and a file. */
function sourceWithSnapshot(): { source: string; snapshots: string } {
  const source = subvolume(join(filesystem().path, "home"));
  writeFileSync(join(source, "file"), "x");
  snapshotAs(source, day(1));
  return { source, snapshots: join(source, "snapshot") };
}

let logins = 0;
/** A login whose `open` prints what a perl script makes of the honest lines: $s is the section, $n the nonce. */
async function forger(script: string): Promise<string> {
  const { user } = await sshServer();
  const name = `forger${++logins}`;
  const shell = join(temporaryDirectory(), "shell");
  const perl = join(temporaryDirectory(), "forge.pl");
  writeFileSync(
    perl,
    `$| = 1; my $skip = 0; while (<STDIN>) { my $head = /^([0-9a-f-]{36}) (\\w+)$/;
      if ($head) { ($n, $s, $skip) = ($1, $2, 0); } ${script}\n print unless $skip; }\n`,
  );
  writeFileSync(
    shell,
    `#!/bin/bash\ncase $2 in *btrfs-backup:open*) ;; *) exec /bin/sh "$@";; esac
    set -o pipefail; /bin/sh "$@" | perl ${perl}\n`,
    { mode: 0o755 },
  );
  user(name, shell);
  return name;
}
/** It says that all belongs to root, and that the record is another one. */
function forgingRecord(record: string): Promise<string> {
  const file = join(temporaryDirectory(), "record");
  writeFileSync(file, record);
  return forger(
    `s/^(\\d+) \\d+$/$1 0/ if $s eq "inodes"; s/^\\d+$/0/ if $s eq "user";
    if ($head && $s eq "record") { print; system("cat", "${file}"); $skip = 1; print "\\n"; }`,
  );
}

describe("destinations that another host's record names", () => {
  for (const how of ["a record", "what 0.3.1 left"]) {
    test(`are shown by list, and neither opened nor run, by ${how}`, async () => {
      const { options, url } = await sshServer();
      const { source, snapshots } = sourceWithSnapshot();
      const { locations, sprung, folder } = await trap();
      if (how === "a record") writeFileSync(recordIn(snapshots), knowing(...locations));
      else {
        writeFileSync(
          join(snapshots, ".outstanding_transfers"),
          JSON.stringify({ [day(1)]: { locks: [], parent_locks: locations } }),
        );
      }
      const { stdout } = await run(["list", ...options, url(source)]);
      expect(sprung()).toEqual([]);
      for (const location of locations) expect(stdout).toContain(location);
      await run(["versions", ...options, url(join(source, "file"))]);
      await run(["list", "--json", "--size", ...options, url(source)]);
      expect(sprung()).toEqual([]);
      // Who names one, gets that one.
      const [named] = events(await run(["list", "--json", ...options, url(source), folder]));
      expect(named?.["snapshots"].map(({ at }: { at: unknown[] }) => at.length)).toEqual([2, 2]);
      expect(sprung()).toEqual([`${folder} was read`]);
    });
  }

  test("are not those of --locked-dests, which says so: exit 1, and nothing is run, made or stored", async () => {
    const { options, url } = await sshServer();
    const { source, snapshots } = sourceWithSnapshot();
    const { locations, commands, sprung } = await trap();
    for (const some of [locations, ...locations.map((one) => [one])]) {
      writeFileSync(recordIn(snapshots), knowing(...some));
      const result = await run(["-S", "--locked-dests", ...options, url(source)]);
      expect([some, sprung()]).toEqual([some, []]);
      expect([
        some,
        result.status,
        result.stderr.includes("at ") && /\n {4}at /.test(result.stderr),
      ]).toEqual([some, 1, false]);
      expect(result.stderr).toMatch(/known destination|--locked-dests/);
    }
    expect(commands.length).toBe(2);
  });

  test("are not believed of a host that forges what open prints, and says that all of it is root's", async () => {
    const { options, url } = await sshServer();
    const { source, snapshots } = sourceWithSnapshot();
    sh(`chown 1234:1234 "$1"`, snapshots);
    const { locations, sprung } = await trap();
    const name = await forgingRecord(knowing(...locations));
    for (const words of [
      ["list", url(source, name)],
      ["versions", url(join(source, "file"), name)],
      ["-S", "--locked-dests", url(source, name)],
    ]) {
      const { status } = await run([...words, ...options]);
      expect([words, sprung()]).toEqual([words, []]);
      if (words[0] === "-S") expect(status).toBe(1);
    }
  });
});

test("a record that came back with what another host had, runs nothing here", async () => {
  const { options, url } = await sshServer();
  const { source, snapshots } = sourceWithSnapshot();
  const { commands, sprung } = await trap();
  const backups = join(filesystem().path, "backups");
  writeFileSync(recordIn(snapshots), knowing(...commands));
  await expectRun(0, [source, backups]);
  const target = join(filesystem().path, "home");
  await expectRun(0, ["restore", ...options, url(backups), target]);
  for (const words of [
    ["list", target],
    ["versions", join(target, "file")],
    ["-S", "--locked-dests", target],
  ]) {
    await run(words);
    expect([words, sprung()]).toEqual([words, []]);
  }
});

test("a record here that others can write, by whatever way, opens nothing and runs nothing", async () => {
  const ways: Record<string, (source: string, snapshots: string) => void> = {
    "the folder is another user's": (_, snapshots) => sh(`chown 1234:1234 "$1"`, snapshots),
    "the record is another user's": (_, snapshots) =>
      sh(`chown 1234:1234 "$1"`, recordIn(snapshots)),
    "all may write to the folder": (_, snapshots) => chmodSync(snapshots, 0o777),
    "all may write to the record": (_, snapshots) => chmodSync(recordIn(snapshots), 0o666),
    "an ACL lets one write to the folder": (_, snapshots) =>
      sh(`setfacl -m u:1234:rwx "$1"`, snapshots),
    "another user's link leads to a folder of root's": (source, snapshots) =>
      sh(`mv "$2" "$1/kept"; ln -s kept "$2"; chown -h 1234:1234 "$2" "$1"`, source, snapshots),
  };
  const found: string[] = [];
  const { locations, sprung } = await trap();
  for (const [way, prepare] of Object.entries(ways)) {
    const { source, snapshots } = sourceWithSnapshot();
    writeFileSync(recordIn(snapshots), knowing(...locations));
    prepare(source, snapshots);
    for (const words of [
      ["list", source],
      ["versions", join(source, "file")],
      ["-S", "--locked-dests", source],
    ]) {
      const { status } = await run(words);
      found.push(...sprung().map((what) => `${way}: ${words[0]}: ${what}`));
      if (words[0] === "-S" && status !== 1) found.push(`${way}: exit ${status}`);
    }
  }
  expect(found).toEqual([]);
});

describe("what open prints is checked", () => {
  /** One line that is no stack trace, whatever is asked; nothing is taken for true. */
  async function refusedBy(
    scripts: Record<string, string>,
    change: (source: string) => void = () => {},
  ): Promise<void> {
    const { options, url } = await sshServer();
    const { source } = sourceWithSnapshot();
    change(source);
    const found: unknown[] = [];
    for (const [what, script] of Object.entries(scripts)) {
      const result = await run(["list", ...options, url(source, await forger(script))]);
      if (
        result.status !== 1 ||
        /^ {4}at /m.test(result.stderr) ||
        result.stderr.split("\n").length !== 2
      ) {
        found.push([what, result.status, result.stderr]);
      }
    }
    expect(found).toEqual([]);
  }

  test("a folder or a source that is not the one that was asked for", () =>
    refusedBy({
      "another folder": `$_ = "/etc\\n" if $s eq "folder" && !$head && /\\S/;`,
      "the folder above": `s{/[^/\\n]+$}{} if $s eq "folder" && !$head;`,
      "a path that is not absolute": `$_ = "etc\\n" if $s eq "folder" && !$head && /\\S/;`,
      "a path with dots": `s{/(?=[^/]+$)}{/../} if $s eq "folder" && !$head;`,
      "a source that nobody asked for": `print "$n source\\n/etc\\n\\n" if $head && $s eq "host";`,
    }));

  test("a section that comes twice, is missing, or is unknown", () =>
    refusedBy({
      ...Object.fromEntries(
        ["folder", "host", "user", "inodes", "places", "record", "entries", "subvolumes"].map(
          (name) => [`${name} twice`, `print "$n ${name}\\n\\n" if $head && $s eq "old";`],
        ),
      ),
      ...Object.fromEntries(
        ["host", "user", "inodes", "places", "record", "entries", "subvolumes", "filesystems"].map(
          (name) => [`no ${name}`, `$skip = 1 if $s eq "${name}";`],
        ),
      ),
      "one that nobody knows": `print "$n evil\\n\\n" if $head && $s eq "old";`,
    }));

  test("other shapes than it prints", () =>
    refusedBy({
      "an inode that is none": `s/^\\d+ /x / if $s eq "inodes";`,
      "an owner that is none": `s/^(\\d+) \\d+ /$1 x / if $s eq "inodes";`,
      "a user that is none": `s/^\\d+$/root/ if $s eq "user";`,
      "free space that is none": `s/^(\\w+ \\w+) .*/$1 x y/ if $s eq "places";`,
      "roots that are no numbers": `s/^(\\S+) subvolumes$/$1 roots\\nx\\n\\n$1 alone/ if $head && $s eq "subvolumes";
        $skip = 1 if $s eq "readonly" || ($s eq "subvolumes" && !$head);`,
      "a process that is none": `print "$n locked\\n1; touch x\\n\\n" if $head && $s eq "mounts";`,
      "mounts that are none": `$_ = "x\\n" if $s eq "mounts" && !$head && /\\S/;`,
      "two host names": `s/^(.+)$/$1\\nanother/ if $s eq "host" && !$head;`,
    }));
});

// ── What a person sees ──

/** What moves a cursor, changes a title, rings, or turns the text around. */
const UNSEEN = /[\x00-\x09\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]/;
const C1 = "\x9b2J\u202e\u2066";
const EVIL = `\x1b]0;e\x07\r${C1}x`;
/** Runs commands, and tells what of their output would do something to a terminal. */
class Watch {
  readonly found: string[] = [];
  look(what: unknown, text: string): void {
    const at = text.search(UNSEEN);
    const shown = JSON.stringify([what, text.slice(Math.max(0, at - 30), at + 20)]);
    if (at >= 0) {
      this.found.push(
        shown.replace(/[^ -~]/g, (c) => `\\u${c.charCodeAt(0).toString(16).padStart(4, "0")}`),
      );
    }
  }
  async run(words: readonly string[], options: Options = {}): Promise<Result> {
    const result = await run(words, options);
    this.look([words, "stderr"], result.stderr);
    if (!words.includes("--json")) this.look([words, "stdout"], result.stdout);
    return result;
  }
}

describe("nothing that a person sees has control characters:", () => {
  test("a run's log, summary and metrics, with every kind of destination", async () => {
    const watch = new Watch();
    const { source, b } = pair();
    const metrics = join(temporaryDirectory(), "metrics");
    writeFileSync(join(source, EVIL), "x");
    subvolume(join(source, `nested${EVIL}`));
    const places = [
      join(b.path, EVIL),
      `raw://${join(b.path, `raw${EVIL}`)}`,
      `shell://cat >/dev/null # ${EVIL}`,
      `shell://printf '${EVIL}' >&2; exit 1`,
    ];
    const common = ["-p", C1, "--metrics", metrics, source];
    for (const words of [
      ["-v", "debug", "-d"],
      ["-S", "-v", "debug", "-N", "1", "-n", "1", "--dry-run"],
      ["--before-snapshot", `printf '${EVIL}'; exit 1`],
    ]) {
      await watch.run([...words, ...common, ...places]);
      if (!words.includes("--dry-run")) watch.look("metrics", readFileSync(metrics, "utf8"));
    }
    await watch.run([
      "-S",
      source,
      `raw://${join(source, `snapshot/${EVIL}`)}`,
      join(b.path, `no/${EVIL}`),
    ]);
    const sent = events(await watch.run(["--json", ...common, places[0] as string])).find(
      ({ event }) => event === "transfer",
    );
    expect(sent).toMatchObject({
      destination: places[0],
      name: expect.stringMatching(new RegExp(`^${C1}\\d{8}-\\d{6}$`)),
    });
    const [list] = events(await watch.run(["list", "--json", "-p", C1, source]));
    expect(list?.["locations"].map(({ id }: { id: string }) => id).sort()).toEqual(
      [source, ...places.slice(0, 3)].sort(),
    );
    expect(watch.found).toEqual([]);
  });

  test("the tables and messages of every other command", async () => {
    const watch = new Watch();
    const { source, b } = pair();
    writeFileSync(join(source, EVIL), "x");
    const [destination, store, second] = [
      join(b.path, EVIL),
      `raw://${join(b.path, `raw${EVIL}`)}`,
      join(filesystem().path, `${EVIL}2`),
    ];
    for (const n of [1, 2, 3]) snapshotAs(source, `${C1}${day(n)}`);
    await expectRun(0, ["-S", "-p", C1, source, destination, store]);
    const p = ["-p", C1];
    sh(
      `btrfs -q subvolume create "$1/$2" >/dev/null; mkdir "$1/$3"`,
      destination,
      `\x1b[2J${day(1)}`,
      `${C1}${day(9)}`,
    );
    for (const words of [
      ["list", ...p, source],
      ["list", "-N", "1", "-n", "1", "--size", source],
      ["list", destination, store, `/no/${EVIL}`],
      ["list", "--max-age", "1h", ...p, destination, store, `/no/${EVIL}`],
    ])
      await watch.run(words);
    for (const words of [
      ["verify", ...p, source, destination],
      ["verify", store],
      ["verify", "-v", "debug", ...p, destination, `/no/${EVIL}`],
      ["verify", "--snapshot", EVIL, ...p, source, destination],
    ])
      await watch.run(words);
    for (const words of [
      ["versions", ...p, join(source, EVIL)],
      ["versions", ...p, join(source, `${EVIL}2`)],
      ["versions", ...p, join(source, EVIL), destination, "--get", `${C1}${day(1)}`],
      ["versions", ...p, join(source, EVIL), "--get", EVIL],
    ])
      await watch.run(words);
    damage(join(destination, `${C1}${day(3)}`), `for f in *x; do echo more >>"$f"; done`);
    await watch.run(["verify", ...p, source, destination]);
    await watch.run(["copy", ...p, destination, second]);
    for (const from of [destination, store]) {
      await watch.run(["restore", ...p, from, join(b.path, `again${EVIL}${from.length}`)]);
    }
    await watch.run([
      "restore",
      ...p,
      "--snapshot",
      EVIL,
      destination,
      join(b.path, `more${EVIL}`),
    ]);
    await watch.run(["unpin", ...p, source, `/no/${EVIL}`]);
    for (const place of [destination, store]) {
      for (const words of [
        ["-n", "2", "--dry-run"],
        ["-n", "1", ...p],
        ["-n", "1"],
      ]) {
        await watch.run(["prune", ...words, place]);
      }
    }
    const version = events(
      await watch.run(["versions", "--json", ...p, join(source, EVIL), second]),
    ).find(({ event }) => event === "version");
    expect(version).toMatchObject({ locations: [source, second], last: `${C1}${day(3)}` });
    expect(watch.found).toEqual([]);
  });

  test("what a login prints, on either stream", async () => {
    const watch = new Watch();
    const { options, url, user } = await sshServer();
    const { source, b } = pair();
    const destination = join(b.path, "d");
    await expectRun(0, [source, destination]);
    const says: Record<string, string> = {
      "as it begins": `printf '%s' "$E"; exec /bin/sh "$@"`,
      "and ends": `printf '%s' "$E"; exit 1`,
      "as an error": `printf '%s' "$E" >&2; exit 1`,
      "beside it": `printf '%s\\n' "$E" >&2; exec /bin/sh "$@"`,
      "as if it were lost": `printf '%s refused' "$E" >&2; exit 255`,
      "that it is missing": `printf '%s' "$E" >&2; exit 66`,
    };
    for (const [i, script] of Object.values(says).entries()) {
      const shell = join(temporaryDirectory(), "shell");
      writeFileSync(shell, `#!/bin/bash\nE='${EVIL}'\n${script}\n`, { mode: 0o755 });
      user(`noisy${i}`, shell);
      const place = url(destination, `noisy${i}`);
      const retries = script.includes("255") ? ["--retries", "1"] : [];
      for (const words of [
        ["list", place],
        ["list", "--max-age", "1h", place],
        ["prune", "-n", "1", place],
        ["verify", source, place],
        ["versions", join(source, "plain/1"), place],
        ["-S", "-d", "-v", "debug", ...retries, source, place],
      ]) {
        if (i === 0 || words[0] === "list" || (i < 4 && words[0] === "-S"))
          await watch.run([...words, ...options]);
      }
    }
    expect(watch.found).toEqual([]);
  });

  test("what a record says of its owner, of destinations, and nonsense", async () => {
    const watch = new Watch();
    const { source, destination, snapshots } = pair();
    await expectRun(0, [source, destination]);
    const owner = { uuid: crypto.randomUUID(), host: EVIL, path: `/${EVIL}` };
    writeFileSync(recordIn(destination), recordOf({ owner }));
    const before = readFileSync(recordIn(snapshots), "utf8");
    await watch.run(["-S", source, destination]);
    await watch.run(["restore", destination, join(source, "../again")]);
    writeFileSync(
      recordIn(snapshots),
      knowing(`/no/${EVIL}`, `shell://cat # ${EVIL}`, `ssh://${EVIL}`),
    );
    for (const words of [
      ["list", source],
      ["unpin", source, "/x"],
      ["-S", "--locked-dests", source],
      ["-S", source, destination],
    ])
      await watch.run(words);
    for (const nonsense of [`{"/": 1\n,"": ${EVIL}\n}\n`, `{"/": 1\n,"": {"owner":${EVIL}}\n}\n`]) {
      writeFileSync(recordIn(destination), nonsense);
      writeFileSync(recordIn(snapshots), nonsense);
      for (const words of [
        ["-S", source, destination],
        ["prune", "-n", "1", destination],
        ["unpin", source, "/x"],
        ["list", source, destination],
      ])
        await watch.run(words);
    }
    expect(before).toContain(destination);
    expect(watch.found).toEqual([]);
  });

  test("what a guarded key has made, and what it is refused with, also in the system's log", async () => {
    const watch = new Watch();
    const { guarded, url } = await sshServer();
    const { source, b } = pair();
    const mine = join(b.path, "laptop");
    mkdirSync(mine);
    const options = guarded("--path", mine);
    const name = EVIL.replace("\r", "");
    await watch.run([...options, "-p", C1, source, url(join(mine, name))]);
    await watch.run([...options, source, url(join(mine, "home"))]);
    const { guard, logged } = guardOf(mine);
    const texts = [
      sent("create", join(mine, `new${EVIL}`), fsidOf(mine), ""),
      sent("create", join(mine, "home", EVIL), fsidOf(mine), C1),
      sent("open", crypto.randomUUID(), "look", `${b.path}/${EVIL}`, "", "", "", "60"),
      sent("open", crypto.randomUUID(), C1, mine, "", "", "", "60"),
      sent("discard", join(mine, "home"), fsidOf(mine), C1, `${C1}${day(1)}`, "", "", ""),
      `sh -c 'x' 'btrfs-backup:${C1}' ''`,
      C1,
      EVIL,
    ];
    for (const text of texts) {
      const { stderr } = await guard(text, { env: { SSH_CONNECTION: `${EVIL} 1 2 3` } });
      watch.look([text, "guard"], stderr);
    }
    for (const line of logged()) watch.look("log", line);
    for (const folder of [...readdirSync(mine), name, `new${EVIL}`].map((one) => join(mine, one))) {
      for (const words of [
        ["list", folder],
        ["list", "--max-age", "1h", folder],
        ["prune", "-n", "1", folder],
        ["verify", folder, source],
      ])
        await watch.run(words);
    }
    expect(watch.found).toEqual([]);
  });

  test("mistakes on the command line, and files that are not there", async () => {
    const watch = new Watch();
    for (const words of [
      [`--${EVIL}`, "/x"],
      ["list", `evil${EVIL}://x`],
      ["list", `x://${EVIL}`],
      [`@/no/${EVIL}`],
      ["-n", EVIL, "/x"],
      ["--compress", EVIL, "/x"],
      ["--ssh-opt", EVIL, "/x", `ssh://h${EVIL}/x`],
      ["guard", "--path", "/x", EVIL],
      ["restore", "--before", EVIL, "/x", "/y"],
      ["list", "/x", `shell://${EVIL}`],
      [`/no/${EVIL}`, "/y"],
    ])
      await watch.run(words);
    expect(watch.found).toEqual([]);
  });
});

// ── gpg ──

describe("--encrypt-to", () => {
  /** A gpg and a btrfs, first in PATH, and a dirmngr that keep a list of how they were called. */
  function recording(): {
    env: Record<string, string>;
    recipient: string;
    calls: (name: string) => string[];
  } {
    const { env, recipient } = gpgKey();
    const tools = temporaryDirectory();
    for (const name of ["gpg", "btrfs"]) {
      writeFileSync(
        join(tools, name),
        `#!/bin/sh\necho "$*" >>"${tools}/${name}.calls"\nexec ${sh(`command -v "$1"`, name)} "$@"\n`,
        { mode: 0o755 },
      );
    }
    writeFileSync(
      join(tools, "dirmngr"),
      `#!/bin/sh\necho "$*" >>"${tools}/dirmngr.calls"\nexit 1\n`,
      { mode: 0o755 },
    );
    writeFileSync(
      join(env["GNUPGHOME"] as string, "gpg.conf"),
      `auto-key-locate clear,local,wkd,keyserver\nauto-key-retrieve\ndirmngr-program ${tools}/dirmngr\n`,
    );
    const calls = (name: string) =>
      existsSync(join(tools, `${name}.calls`))
        ? readFileSync(join(tools, `${name}.calls`), "utf8")
            .trimEnd()
            .split("\n")
        : [];
    return { env: { ...env, PATH: `${tools}:${process.env["PATH"]}` }, recipient, calls };
  }
  const contents = (folder: string) =>
    existsSync(folder)
      ? readdirSync(folder).filter((name) => !name.startsWith(".btrfs-backup."))
      : [];

  test("an unknown recipient is refused before the first byte; no network is asked", async () => {
    const { env, recipient, calls } = recording();
    const { source } = pair();
    const [store, ran] = [join(temporaryDirectory(), "store"), join(temporaryDirectory(), "ran")];
    for (const recipients of [
      ["nobody@example.org"],
      [recipient, "nobody@example.org"],
      ["0123456789ABCDEF0123456789ABCDEF01234567"],
    ]) {
      for (const place of [`raw://${store}`, `shell://touch ${ran}; cat >/dev/null`]) {
        const result = await run(
          [...recipients.flatMap((one) => ["--encrypt-to", one]), source, place],
          { env },
        );
        expect([place, result.status, contents(store), existsSync(ran), calls("dirmngr")]).toEqual([
          place,
          1,
          [],
          false,
          [],
        ]);
        expect(calls("btrfs").filter((call) => call.startsWith("send"))).toEqual([]);
        expect(result.stderr).toMatch(/gpg\b.*--import/);
        expect(result.stderr).toContain(recipients.at(-1) as string);
      }
    }
  });

  test("no call of gpg asks the network for a key, whatever gpg.conf says, nor who signed a stream", async () => {
    const { env, recipient, calls } = recording();
    const { source, b } = pair();
    const store = join(temporaryDirectory(), "store");
    await expectRun(0, ["--encrypt-to", recipient, source, `raw://${store}`], { env });
    await expectRun(0, ["-S", "--encrypt-to", recipient, source, "shell://cat >/dev/null"], {
      env,
    });
    const stranger = gpgKey();
    const [object = ""] = readdirSync(store).filter((name) => name.endsWith(".gpg"));
    const keys = [env["GNUPGHOME"] as string, stranger.env["GNUPGHOME"] as string];
    sh(
      `cd "$1"; GNUPGHOME=$3 gpg -q --batch --disable-dirmngr -d <"$2" >plain
      GNUPGHOME=$3 gpg -q --batch --disable-dirmngr --export >key
      export GNUPGHOME=$4; me=$(gpg --batch --with-colons -K | sed -n 's/^fpr:*\\([^:]*\\):/\\1/p' | head -n 1)
      gpg -q --batch --import key
      to=$(gpg --batch --with-colons --show-keys key | sed -n 's/^fpr:*\\([^:]*\\):/\\1/p' | head -n 1)
      gpg -q --batch --yes --trust-model always -u "$me" -r "$to" --sign --encrypt -o "$2" plain
      rm plain key; sha256sum "$2" >"$2.sha256"`,
      store,
      object,
      ...keys,
    );
    await run(["restore", `raw://${store}`, join(b.path, "again")], { env });
    const encrypting = calls("gpg").filter((call) => /(^| )(-[a-z]*e|--encrypt)( |$)/.test(call));
    expect(encrypting.length).toBeGreaterThan(1);
    const lacking = encrypting.filter((call) => !call.includes("--no-auto-key-locate"));
    const asking = calls("gpg").filter((call) =>
      /--(recv|search|refresh|fetch|locate)-/.test(call),
    );
    expect({ lacking, asking, started: calls("dirmngr") }).toEqual({
      lacking: [],
      asking: [],
      started: [],
    });
  });
});

// ── Guarded keys ──

type Answer = { readonly status: number | null; readonly stdout: string; readonly stderr: string };
type Guard = (
  text: string,
  how?: { input?: string | Buffer; env?: Record<string, string> },
) => Promise<Answer>;
/** The real program as the command of a key for a folder; what it tells the system's log is kept. */
function guardOf(path: string, ...flags: string[]): { guard: Guard; logged: () => string[] } {
  const tools = temporaryDirectory();
  const log = join(tools, "log");
  writeFileSync(join(tools, "logger"), `#!/bin/sh\nprintf '%s\\n' "$*" >>"${log}"\n`, {
    mode: 0o755,
  });
  const guard: Guard = (text, { input = "", env = {} } = {}) =>
    new Promise((done) => {
      const child = spawn(join(ROOT, "dist/btrfs-backup"), ["guard", "--path", path, ...flags], {
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
      const late = setTimeout(() => child.kill("SIGKILL"), 20_000);
      child.on("close", (status) => (clearTimeout(late), done({ status, ...texts })));
      child.stdin.on("error", () => {});
      child.stdin.end(input);
    });
  return {
    guard,
    logged: () => (existsSync(log) ? readFileSync(log, "utf8").trimEnd().split("\n") : []),
  };
}
const OBJECT = `20300101-000000+0000_12345678_12345678_${crypto.randomUUID()}_${crypto.randomUUID()}_full.btrfs`;

describe("a guarded key", () => {
  /** A folder for a key, with a backup in it. */
  async function served() {
    const { source, b } = pair();
    const mine = join(b.path, "laptop");
    const home = join(mine, "home");
    mkdirSync(mine);
    await expectRun(0, [source, home]);
    return { source, b, mine, home, fsid: fsidOf(home) };
  }

  test("that names a part which is not there, or is none, is refused in one line, which is logged", async () => {
    const { mine, home, fsid } = await served();
    const { guard, logged } = guardOf(mine);
    const chain = JSON.parse(
      readFileSync(recordIn(home), "utf8").split("\n")[1]?.slice(5) as string,
    ) as object;
    const receive = (part: string) =>
      sent(
        "receive",
        "-q",
        home,
        fsid,
        "",
        "1",
        "",
        '{"/": 1',
        ',"": ',
        `{"receiving":"20300101-000000",`,
        JSON.stringify(chain).slice(1),
        part,
        "0".repeat(64),
        "5",
        "0",
      );
    symlinkSync("/etc/passwd", join(home, `.${OBJECT}.p1-.part`));
    mkdirSync(join(home, `.${OBJECT}.p2-.part`));
    sh(`mkfifo "$1"`, join(home, `.${OBJECT}.p2-3.part`));
    const names = readdirSync(home).sort();
    const found: unknown[] = [];
    for (const [i, part] of ["p0-", "p1-", "p2-", "p2-3"].entries()) {
      const { status, stdout, stderr } = await guard(receive(`${OBJECT}.${part}`));
      if (
        status !== 65 ||
        stdout !== "" ||
        !/^btrfs-backup guard: refused: [^\n]+\n$/.test(stderr) ||
        logged().length !== i + 1
      )
        found.push([part, status, stdout, stderr, logged().length]);
    }
    expect(found).toEqual([]);
    expect(readdirSync(home).sort()).toEqual(names);
    expect(snapshotNames(home).length).toBe(1);
  });

  test("that says later how long it waits says look or a number of seconds, or is refused", async () => {
    const { mine, home } = await served();
    const { guard } = guardOf(mine);
    const open = (wait: string) => sent("open", crypto.randomUUID(), wait, home, "", "", "", "60");
    const bad = [
      "look; touch x",
      "99999999999",
      "-1",
      "$(touch x)",
      "",
      "1.5",
      "0x10",
      "looks",
      "later",
      "1 2",
      "\\x",
      "-w 1",
      "1000000",
    ];
    const found: unknown[] = [];
    for (const line of bad) {
      const { status, stderr } = await guard(open("later"), { input: `${line}\n` });
      if (status !== 65 || /flock|sh:|\n./.test(stderr)) found.push([line, status, stderr]);
    }
    for (const line of ["look", "0", "5", "999999"]) {
      const { status, stderr } = await guard(open("later"), { input: `${line}\n` });
      if (status !== 0 || stderr !== "") found.push([line, status, stderr]);
    }
    expect(found).toEqual([]);
  });

  test("with a transfer open in one prefix does not keep prune from the others", async () => {
    const { guarded, options, url } = await sshServer();
    const { source, b, mine, home } = await served();
    const raw = join(mine, "raw");
    for (const prefix of ["", "b-", "c-"])
      for (const n of [1, 2, 3]) snapshotAs(source, `${prefix}${day(n)}`);
    for (const prefix of ["", "b-", "c-"]) {
      await expectRun(0, [
        "-S",
        "-p",
        prefix,
        source,
        home,
        `raw://${raw}`,
        "--for",
        `raw://${raw}`,
        "--full-every",
        "1",
      ]);
    }
    sh(`head -c 60M /dev/urandom >"$1/large"`, source);
    const key = guarded("--path", mine);
    for (const [folder, place] of [
      [home, url(home)],
      [raw, `raw+${url(raw)}`],
    ] as const) {
      const running = start([...key, "--rate-limit", "3m", source, place], { group: true });
      const busy = () =>
        folder === raw
          ? readdirSync(raw).some((name) => name.endsWith(".part"))
          : [...subvolumes(home).values()].some(({ readonly }) => !readonly);
      await waitFor("the transfer", busy);
      const namesOf = (prefix: string) =>
        folder === raw
          ? readdirSync(raw).filter(
              (name) => name.startsWith(`${prefix}2`) && name.endsWith(".btrfs"),
            )
          : snapshotNames(home, prefix);
      const first = namesOf("");
      const result = await run([
        "prune",
        "-n",
        "1",
        ...(folder === raw ? [...options, place] : [home]),
      ]);
      expect([place, namesOf("b-").length, namesOf("c-").length]).toEqual([place, 1, 1]);
      expect(namesOf("")).toEqual(first);
      expect([0, 1]).toContain(result.status as number);
      expect(result.stderr).toContain(folder);
      expect(busy()).toBe(true);
      process.kill(-running.pid, "SIGKILL");
      await running.finished;
    }
    expect(b.path).not.toBe("");
  });
});

describe("guard --max-bytes", () => {
  const MIB = 2 ** 20;
  /** A source whose next snapshot is so many bytes larger than the one before, and in full has as many. */
  function growing(): { source: string; snapshot: (name: string, bytes?: number) => void } {
    const source = subvolume(join(filesystem().path, "home"));
    const snapshot = (name: string, bytes = 3 * MIB) => {
      sh(`head -c "$2" /dev/urandom >"$1/data"`, source, String(bytes));
      snapshotAs(source, name);
    };
    return { source, snapshot };
  }
  const forget = (source: string, ...names: string[]) =>
    sh(`cd "$1/snapshot"; shift; btrfs -q subvolume delete "$@" >/dev/null`, source, ...names);
  function room() {
    const mine = join(filesystem().path, "laptop");
    mkdirSync(mine);
    return { mine, home: join(mine, "home"), raw: join(mine, "raw"), other: join(mine, "other") };
  }
  const stored = (folder: string) =>
    existsSync(folder)
      ? readdirSync(folder)
          .filter((name) => name.endsWith(".btrfs"))
          .map((name) => name.slice(0, name.indexOf("+")))
      : [];
  const standing = (folder: string) =>
    existsSync(folder) ? [...subvolumes(folder).keys()].sort() : [];

  test("of ten streams of a third of it three stay; what is pruned is taken off; no key resets it", async () => {
    const { guarded, url } = await sshServer();
    const { source, snapshot } = growing();
    const { mine, home } = room();
    const names = Array.from({ length: 10 }, (_, i) => day(i + 1));
    for (const name of names) snapshot(name);
    const options = guarded("--path", mine, "--max-bytes", "10m");
    const backUp = async () => expectRun(1, [...options, "-S", "--json", source, url(home)]);
    const first = await backUp();
    expect(standing(home)).toEqual(names.slice(0, 3));
    expect(events(first).filter(({ event }) => event === "transfer").length).toBe(3);
    const { stderr } = await backUp();
    expect(stderr).toMatch(/max-bytes/);
    expect(standing(home)).toEqual(names.slice(0, 3));
    await expectRun(0, ["prune", "-n", "1", home]);
    forget(source, ...names.slice(0, 2));
    await backUp();
    expect(standing(home)).toEqual(names.slice(2, 5));
    // A thief writes the record as if there was nothing.
    const { guard } = guardOf(mine, "--max-bytes", "10m");
    const { owner } = JSON.parse(
      readFileSync(recordIn(home), "utf8").split("\n")[1]?.slice(5) as string,
    ) as {
      owner: object;
    };
    await guard(sent("record", home, fsidOf(home), '{"/": 1', ',"": ', JSON.stringify({ owner })));
    await backUp();
    expect(standing(home)).toEqual(names.slice(2, 5));
  });

  test("is one sum for all folders, stores and prefixes below the path, less what key or server deletes", async () => {
    const { guarded, url } = await sshServer();
    const { source, snapshot } = growing();
    const { mine, home, raw, other } = room();
    for (const name of [`a-${day(1)}`, day(1), day(2), `b-${day(1)}`]) snapshot(name);
    const options = guarded("--path", mine, "--max-bytes", "10m", "--allow-delete");
    const [folder, store] = [url(home), `raw+${url(raw)}`];
    const backUp = (status: number, ...words: string[]) =>
      expectRun(status, [
        ...options,
        "-S",
        ...(words.includes(store) ? ["--full-every", "1"] : []),
        ...words.slice(0, -1),
        source,
        words.at(-1) as string,
      ]);
    await backUp(0, "-p", "a-", folder);
    await backUp(0, store);
    const full = async () => {
      const before = [standing(home), stored(raw)];
      await backUp(1, "-p", "b-", folder);
      await backUp(1, "-p", "b-", store);
      await backUp(1, "-p", "b-", url(other));
      expect([standing(home), stored(raw), standing(other)]).toEqual([...before, []]);
    };
    await full();
    await expectRun(0, ["prune", "-n", "1", `raw://${raw}`]);
    forget(source, day(1), day(2)); // else they are sent again
    snapshot(day(3));
    await backUp(0, store);
    await full();
    await expectRun(0, ["prune", ...options, "-n", "1", store]);
    await backUp(0, "-p", "b-", url(other));
    expect([standing(home), stored(raw), standing(other)]).toEqual([
      [`a-${day(1)}`],
      [day(3)],
      [`b-${day(1)}`],
    ]);
    await backUp(1, "-p", "b-", folder);
    await expectRun(0, ["verify", `raw://${raw}`]);
  });

  test("what is kept to go on from counts, and once only", async () => {
    const { guarded, url } = await sshServer();
    const [large, small] = [growing(), growing()];
    const { mine, home, raw } = room();
    large.snapshot(day(1), 8 * MIB);
    small.snapshot(`s-${day(1)}`, 6 * MIB);
    const options = guarded("--path", mine, "--max-bytes", "10m");
    const words = [...options, "-S", "--resume", large.source, `raw+${url(raw)}`];
    const running = start(["--rate-limit", "4m", ...words], { group: true });
    const part = () =>
      existsSync(raw)
        ? readdirSync(raw)
            .filter((name) => name.endsWith(".part"))
            .map((name) => statSync(join(raw, name)).size)
        : [];
    await waitFor(
      "a part",
      () => running.child.exitCode !== null || part().some((size) => size > 5 * MIB),
    );
    expect(running.child.exitCode).toBe(null);
    process.kill(-running.pid, "SIGKILL");
    await running.finished;
    for (const place of [url(home), `raw+${url(raw)}`]) {
      await expectRun(1, [...options, "-S", "-p", "s-", "--wait", "30", small.source, place]);
    }
    expect([standing(home), stored(raw), part().length]).toEqual([[], [], 1]);
    await expectRun(0, ["--wait", "30", ...words]);
    await expectRun(1, [...options, "-S", "-p", "s-", small.source, url(home)]);
    expect([standing(home), stored(raw)]).toEqual([[], [day(1)]]);
    await expectRun(0, ["verify", `raw://${raw}`]);
  });

  test("sessions side by side have no more together", async () => {
    const { guarded, url } = await sshServer();
    const { source, snapshot } = growing();
    const { mine, home, raw, other } = room();
    const options = guarded("--path", mine, "--max-bytes", "10m");
    const prefixes = ["a-", "b-", "c-"];
    for (const prefix of prefixes) snapshot(`${prefix}${day(1)}`, 6 * MIB);
    const places = [url(home), `raw+${url(raw)}`, url(other)];
    const count = () => standing(home).length + stored(raw).length + standing(other).length;
    await Promise.all(
      places.map((place, i) =>
        run([...options, "-S", "-p", prefixes[i] as string, "--rate-limit", "6m", source, place]),
      ),
    );
    expect(count()).toBeLessThanOrEqual(1);
    for (const [i, place] of places.entries()) {
      await run([...options, "-S", "-p", prefixes[i] as string, source, place]);
    }
    expect(count()).toBe(1);
  });

  test("SIZE is bytes, with k, m or g", async () => {
    for (const size of ["", "x", "-1", "1e3", "10mb", "1 m"]) {
      expect([size, (await run(["guard", "--path", "/x", "--max-bytes", size])).stderr]).toEqual([
        size,
        expect.not.stringContaining("unknown option"),
      ]);
    }
    const { mine, home } = room();
    const { source, snapshot } = growing();
    snapshot(day(1));
    await expectRun(0, ["-S", source, home]);
    for (const size of ["1", "1000k", "1M", "2g"]) {
      expect(
        (
          await guardOf(mine, "--max-bytes", size).guard(
            sent("open", crypto.randomUUID(), "look", home, "", "", "", "60"),
          )
        ).status,
      ).toBe(0);
    }
  });
});
