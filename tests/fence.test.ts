// The kernel holds the fence: whoever has a key, or owns SOURCE or a destination, moves no write,
// no deletion and no look to another place, however fast they put links, devices and FIFOs in our way.

import { afterAll, describe, expect, test } from "bun:test";
import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import {
  closeSync,
  existsSync,
  lstatSync,
  mkdirSync,
  openSync,
  readdirSync,
  readFileSync,
  statSync,
  symlinkSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import { commandFor, parseCommand } from "../btrfs-backup.ts";
import { attribute, command, stream, streamOf } from "./support/stream.ts";
import {
  expectRun,
  filesystem,
  nextSecond,
  pair,
  type Result,
  ROOT,
  run,
  type Running,
  sh,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  subvolumes,
  temporaryDirectory,
  waitFor,
} from "./support/rig.ts";
import { fsidOf, HOST, sent } from "./support/wire.ts";
import { seeded, soak } from "./support/random.ts";
import { numberedUuid } from "./support/names.ts";

/** The format in which a run asks for what is in a snapshot. */
const LISTED = "%n\\0%f\\0%u:%g\\0%s\\0%.9Y\\0%t:%T\\0%i\\0%N\\0";
/** Who owns SOURCE, and is not root. */
const USER = "4711";

/** What was started here and may still run when a test has failed. */
const started = new Set<ChildProcess>();
function ours(child: ChildProcess): ChildProcess {
  started.add(child.on("close", () => started.delete(child)));
  return child;
}
afterAll(() => {
  for (const child of started) child.kill("SIGKILL");
});

type Device = { readonly path: string; readonly rdev: number; readonly contents: () => string };
/** A block device over a scratch file, which is gone when this process is. */
function scratchDevice(): Device {
  const file = join(temporaryDirectory(), "device");
  sh(`truncate -s 8M "$1"`, file);
  const path = sh(`losetup -f --show "$1"`, file);
  openSync(path, "r"); // it is detached by its last close
  sh(`losetup -d "$1"`, path);
  const { rdev } = statSync(path);
  const [major, minor] = [(rdev >> 8) & 0xfff, (rdev & 0xff) | ((rdev >> 12) & 0xfff00)];
  return {
    path,
    rdev: (minor & 0xff) | (major << 8) | ((minor & ~0xff) << 12),
    contents: () => sh(`sha256sum <"$1"`, path),
  };
}

type Answer = { readonly status: number | null; readonly stdout: string; readonly stderr: string };
type Session = {
  readonly write: (bytes: Buffer) => void;
  readonly end: (bytes?: Buffer) => Promise<Answer>;
};

/** A session of a guarded key, as sshd begins it. */
function session(flags: readonly string[], text: string): Session {
  const env = {
    PATH: process.env["PATH"],
    SSH_CONNECTION: "192.0.2.1 1 192.0.2.2 22",
    SSH_ORIGINAL_COMMAND: text,
  };
  const child = ours(
    spawn(join(ROOT, "dist/btrfs-backup"), ["guard", ...flags], { cwd: "/", env, detached: true }),
  );
  const texts = { stdout: "", stderr: "" };
  child.stdout?.on("data", (data) => (texts.stdout += (data as Buffer).toString("latin1")));
  child.stderr?.on("data", (data) => (texts.stderr += data));
  child.stdin?.on("error", () => {});
  const finished = new Promise<Answer>((done) =>
    child.on("close", (status) => done({ status, ...texts })),
  );
  return {
    write: (bytes) => void child.stdin?.write(bytes),
    end: (bytes = Buffer.alloc(0)) => (child.stdin?.end(bytes), finished),
  };
}
const answer = (flags: readonly string[], text: string, input?: Buffer) =>
  session(flags, text).end(input);

/** A perl script that another user runs until it is stopped; it has begun, and says so. */
async function attack(script: string, ...args: string[]): Promise<{ stop: () => Promise<void> }> {
  const [program, ...words] = [
    "setpriv",
    "--reuid",
    USER,
    "--regid",
    USER,
    "--clear-groups",
    "--pdeathsig",
    "KILL",
    "perl",
    "-MPOSIX",
    "-e",
  ] as const;
  const child = ours(
    spawn(program, [...words, `$| = 1; ${script}`, ...args], {
      cwd: "/",
      stdio: ["ignore", "pipe", "inherit"],
    }),
  );
  const closed = new Promise<void>((done) => child.on("close", () => done()));
  await new Promise<void>((begun, fail) =>
    child.stdout
      ?.on("data", () => begun())
      .on("close", () => fail(new Error("the attacker has ended"))),
  );
  return { stop: async () => (child.kill("SIGKILL"), closed) };
}

/** What a run says at its end, which must come. */
async function ended(running: Running, seconds = 60): Promise<Result> {
  let timer: Timer | undefined;
  const late = new Promise<null>((done) => (timer = setTimeout(() => done(null), seconds * 1000)));
  const result = await Promise.race([running.finished, late]);
  clearTimeout(timer);
  if (result !== null) return result;
  process.kill(-running.pid, "SIGKILL");
  throw new Error(`it had not ended after ${seconds} s: ${running.stderr()}`);
}
const endedRun = (...args: string[]) => ended(start(args, { group: true }));

/** Everything in a folder and below it, and the subvolumes there, whatever stands beside it. */
const state = (path: string) =>
  sh(
    `cd "$1"; find . -inum 2 -prune -o -printf '%p %y %m %U %s %T@ %C@ %l\\n' | sort | sha256sum
    find . -xdev -type f -exec sha256sum {} + 2>/dev/null | sort | sha256sum
    find . -inum 256 -exec btrfs subvolume show {} ';' 2>/dev/null | grep -v -e Generation -e 'Send t' -e 'Receive t'`,
    path,
  );

/** SOURCE and its snapshot folder are the user's, as a home directory is. */
function homeOf(user = USER) {
  const it = pair();
  sh(`mkdir "$1/snapshot"; chown -R "$2" "$1"; chmod 755 "$1"`, it.source, user);
  return it;
}

describe("a guarded key that may push", () => {
  const P = attribute.path;
  const end = command("end");
  const receive = (home: string, prefix: string) =>
    sent("receive", "-q", home, fsidOf(home), "", "1", prefix, "", "", "", "");
  const begin = (name: string, own: number) =>
    command("subvol", P(name), attribute.uuid(numberedUuid(own)), attribute.ctransid(1));
  const on = (name: string, own: number, parent: number) =>
    command(
      "snapshot",
      P(name),
      attribute.uuid(numberedUuid(own)),
      attribute.ctransid(1),
      attribute.cloneUuid(numberedUuid(parent)),
      attribute.cloneCtransid(1),
    );
  const mkfile = command("mkfile", P("a"), attribute.ino(300));
  const write = command("write", P("a"), attribute.offset(0), attribute.data("evil".repeat(1024)));
  const truncate = command("truncate", P("a"), attribute.size(0));

  async function server(...flags: string[]) {
    const { source, b } = pair();
    const { guarded, url } = await sshServer();
    const mine = join(b.path, "laptop");
    mkdirSync(mine);
    const home = join(mine, "home");
    await expectRun(0, [source, home]);
    return {
      b,
      mine,
      home,
      flags: ["--path", mine, ...flags],
      options: guarded("--path", mine, ...flags),
      url,
    };
  }

  const removals: Record<
    string,
    { flags: string[]; prune: (it: Awaited<ReturnType<typeof server>>) => string[] }
  > = {
    "the key itself": {
      flags: ["--allow-delete"],
      prune: ({ options, url, home }) => [...options, url(home)],
    },
    "the server's own prune": { flags: [], prune: ({ home }) => [home] },
  };
  for (const [who, { flags, prune }] of Object.entries(removals)) {
    test(`writes to no device of a backup that ${who} removes and that is replaced meanwhile`, async () => {
      const it = await server(...flags);
      const device = scratchDevice();
      const before = device.contents();
      const node = command(
        "mknod",
        P("a"),
        attribute.ino(300),
        attribute.rdev(device.rdev),
        attribute.mode(0o60600),
      );
      expect(
        await answer(
          it.flags,
          receive(it.home, ""),
          stream(begin("20200101-000000", 5), node, end),
        ),
      ).toMatchObject({ status: 0 });
      expect(
        await answer(it.flags, receive(it.home, ""), stream(begin("20200102-000000", 8), end)),
      ).toMatchObject({
        status: 0,
      });
      const waiting = session(it.flags, receive(it.home, "x-"));
      waiting.write(stream(on("x-20200103-000000", 6, 5)));
      await waitFor("the stream's subvolume", () =>
        existsSync(join(it.home, "x-20200103-000000/a")),
      );
      await expectRun(0, ["prune", "-p", "", "-n", "1", ...prune(it)]);
      expect(existsSync(join(it.home, "20200101-000000"))).toBe(false);
      expect(
        await answer(
          it.flags,
          receive(it.home, ""),
          stream(begin("20200101-000000", 7), mkfile, end),
        ),
      ).toMatchObject({ status: 0 });
      expect(lstatSync(join(it.home, "x-20200103-000000/a")).isBlockDevice()).toBe(true);
      const { status } = await waiting.end(Buffer.concat([write, end]));
      expect({ device: device.contents(), succeeded: status === 0 }).toEqual({
        device: before,
        succeeded: false,
      });
    });
  }

  test("writes through no link of a backup that is replaced meanwhile", async () => {
    const it = await server("--allow-delete");
    const victim = join(temporaryDirectory(), "victim");
    writeFileSync(victim, "root's");
    // Receive is in a chroot there: a link leads to what is beside it, at the most.
    const beside = join(it.home, "beside");
    writeFileSync(beside, "root's");
    for (const [i, [to, file]] of (
      [
        [victim, victim],
        ["../beside", beside],
        ["/beside", beside],
      ] as const
    ).entries()) {
      const [first, second] = [`2020010${i + 1}-000000`, `x-2020010${i + 1}-000000`];
      const link = command("symlink", P("a"), attribute.ino(300), attribute.pathLink(to));
      expect(
        await answer(it.flags, receive(it.home, ""), stream(begin(first, 10 + i), link, end)),
      ).toMatchObject({
        status: 0,
      });
      expect(
        await answer(
          it.flags,
          receive(it.home, ""),
          stream(begin(`2020020${i + 1}-000000`, 40 + i), end),
        ),
      ).toMatchObject({ status: 0 });
      const waiting = session(it.flags, receive(it.home, "x-"));
      waiting.write(stream(on(second, 20 + i, 10 + i)));
      await waitFor("the stream's subvolume", () => subvolumes(it.home).has(second));
      await expectRun(0, ["prune", "-p", "", "-n", "1", ...it.options, it.url(it.home)]);
      expect(
        await answer(it.flags, receive(it.home, ""), stream(begin(first, 30 + i), mkfile, end)),
      ).toMatchObject({
        status: 0,
      });
      const { status } = await waiting.end(Buffer.concat([truncate, write, end]));
      expect({
        to,
        file: readFileSync(file, "utf8").slice(0, 10),
        succeeded: status === 0,
      }).toEqual({
        to,
        file: "root's",
        succeeded: false,
      });
    }
  });
});

describe("the owner of SOURCE", () => {
  /** So many old snapshots, a second apart; their names. */
  function snapshots(source: string, count: number, day: string): string[] {
    const two = (n: number) => String(n).padStart(2, "0");
    const names = Array.from(
      { length: count },
      (_, i) => `${day}-${two(Math.floor(i / 3600))}${two(Math.floor(i / 60) % 60)}${two(i % 60)}`,
    );
    sh(
      `cd "$1"; shift; for n; do btrfs -q subvolume snapshot -r . "snapshot/$n" >/dev/null; done`,
      source,
      ...names,
    );
    return names;
  }
  /** Once a snapshot at an end of the list is GONE, all others become links, the last ones first. */
  const SWAP = `my ($folder, $gone, $count, @rest) = @ARGV; my @links = splice @rest, 0, $count; chdir $folder or die;
    print "ready\\n";
    my %gone = (deleted => sub { !lstat $_[0] }, writable => sub { POSIX::access($_[0], 2) }); my $test = $gone{$gone};
    until ($test->($rest[0]) || $test->($rest[-1])) { }
    my $i = 0; for (reverse @rest) { rename $_, "$_.x" and symlink $links[$i++ % @links], $_ }`;

  for (const [what, gone, options] of [
    ["deleted", "deleted", []],
    ["made writable and deleted", "writable", ["-w"]],
  ] as const) {
    test(`has no other subvolume touched by links in the place of snapshots that are being ${what}`, async () => {
      const { source, a, b } = homeOf();
      const [roots, backup] = [subvolume(join(a.path, "roots")), join(b.path, "backup")];
      sh(
        `echo precious >"$1/file"; chmod 700 "$1"; btrfs -q subvolume snapshot -r "$1" "$1.old"
        btrfs send -q "$1.old" | btrfs receive -q "$2"; mv "$2/roots.old" "$2/backup"`,
        roots,
        b.path,
      );
      const victims = [roots, backup];
      const before = victims.map(state);
      for (let round = 1; round <= 3; round++) {
        const names = snapshots(source, 150, `2020010${round}`);
        const attacker = await attack(
          SWAP,
          join(source, "snapshot"),
          gone,
          "2",
          ...victims,
          ...names,
        );
        await endedRun("-N", "1", ...options, source);
        await attacker.stop();
        expect([round, ...victims.map((victim) => existsSync(victim) && state(victim))]).toEqual([
          round,
          ...before,
        ]);
        sh(
          `cd "$1/snapshot"; find . -maxdepth 1 -type l -delete
          find . -maxdepth 1 -inum 256 -exec btrfs -q subvolume delete {} + >/dev/null`,
          source,
        );
      }
    });
  }

  test("has no other snapshot deleted by giving it the name of one that goes", async () => {
    const { source } = homeOf();
    const folder = join(source, "snapshot");
    const names = snapshots(source, 3, "20200101");
    const [old, , kept] = names as [string, string, string];
    const { id } = subvolumes(folder).get(kept) as { id: number };
    const renaming = `mv -T ${old} x && mv -T ${kept} ${old} && mv -T x ${kept}`;
    const swap = `cd ${folder} && setpriv --reuid ${USER} --clear-groups sh -c "${renaming}"`;
    await endedRun("-N", "2", "--after-snapshot", swap, source);
    expect([...subvolumes(folder).values()].map((one) => one.id)).toContain(id);
  });
});

describe("who owns a folder that root writes in", () => {
  /** Puts a link or a FIFO at all names, over and over. */
  const PUT = `my ($folder, $to, @names) = @ARGV; chdir $folder or die; print "ready\\n";
    while (1) { for (@names) { next if lstat; if ($to eq "fifo") { mkfifo $_, 0666 } else { symlink $to, $_ } } }`;
  /** Puts FIFOs there for a moment, some time after a verb has begun: who sees it run knows when what is looked at. */
  const BLINK = `my ($folder, @names) = @ARGV; chdir $folder or die; print "ready\\n"; my %seen;
    while (1) { for my $pid (map { m{(\\d+)} } glob "/proc/[0-9]*") {
      next if $seen{$pid}; open my $file, "<", "/proc/$pid/cmdline" or next;
      local $/; <$file> =~ /btrfs-backup:/ or next;
      $seen{$pid} = 1; select undef, undef, undef, rand 0.006; for (@names) { unlink; mkfifo $_, 0666 }
      select undef, undef, undef, rand 0.006; unlink @names } }`;
  /** Lets those go on that wait for the other end of a FIFO. */
  const release = (folder: string) =>
    sh(
      `find "$1" -maxdepth 1 -type p -exec sh -c 'for f; do : <>"$f"; rm -f "$f"; done' sh {} + 2>/dev/null || :`,
      folder,
    );

  /** Folders of somebody else's, and what runs write in them. */
  function places() {
    const { source, snapshots, destination, b } = homeOf();
    const store = join(b.path, "store");
    sh(`mkdir "$2" "$3"; chown "$1" "$2" "$3"`, USER, destination, store);
    return { source, snapshots, destination, store };
  }
  const RECORD = ".btrfs-backup.json.new";

  const TARGETS: Record<
    string,
    {
      place: (it: ReturnType<typeof places>) => string;
      names: (objects: string[]) => string[];
      store?: boolean;
    }
  > = {
    "SOURCE's record": { place: (it) => it.snapshots, names: () => [RECORD] },
    "a destination's record": { place: (it) => it.destination, names: () => [RECORD] },
    "a stored stream": {
      place: (it) => it.store,
      names: ([object]) => [`.${object}.part`],
      store: true,
    },
    "a stored checksum": {
      place: (it) => it.store,
      names: ([, sum]) => [`.${sum}.part`],
      store: true,
    },
  };
  for (const [what, { place, names, store = false }] of Object.entries(TARGETS)) {
    /** Rounds with something in the place of the file that is made; of a stored stream, the name was seen before. */
    async function rounds(to: string, count: number, each: (round: number) => void) {
      const it = places();
      const where = store ? `raw://${it.store}` : it.destination;
      await expectRun(0, [it.source, where]);
      const objects = readdirSync(it.store)
        .filter((name) => /\.btrfs(\.sha256)?$/.test(name))
        .sort();
      for (let round = 1; round <= count; round++) {
        sh(`find "$1" -name '*.btrfs*' -delete`, it.store);
        const attacking = await attack(PUT, place(it), to, ...names(objects));
        try {
          await endedRun(...(store ? ["-S", "--adopt"] : ["-p", `p${round}-`]), it.source, where);
        } finally {
          await attacking.stop();
          release(place(it));
        }
        each(round);
        sh(
          `cd "$1"; rm -f .btrfs-backup.json.new; [ ! -L .btrfs-backup.json ] || rm .btrfs-backup.json`,
          place(it),
        );
      }
    }

    test(`has nothing written to a device by links in the place of ${what}`, async () => {
      const device = scratchDevice();
      const before = device.contents();
      await rounds(device.path, store ? 8 : 4, (round) =>
        expect([round, device.contents()]).toEqual([round, before]),
      );
    });

    test(`does not make a run wait for ever by a FIFO in the place of ${what}`, async () => {
      await rounds("fifo", 3, () => {});
    });
  }

  const LOCKS = ["lock", "receiving"].map(
    (end) => (prefix: string) => `.btrfs-backup.${prefix}.${end}`,
  );
  const READ = [".btrfs-backup.json", ".outstanding_transfers"].map((name) => () => name);
  for (const [what, names] of [
    ["locks that are made", LOCKS],
    ["files that are read", READ],
  ] as const) {
    test(`does not make a run wait for ever by FIFOs that come and go in the place of ${what}`, async () => {
      const it = places();
      for (let round = 1; round <= 15; round++) {
        const prefix = `p${round}-`;
        const attacker = await attack(BLINK, it.snapshots, ...names.map((name) => name(prefix)));
        try {
          await endedRun("-T", "-p", prefix, it.source);
        } finally {
          await attacker.stop();
          release(it.snapshots);
        }
      }
    });
  }
});

describe("symbolic links on the way", () => {
  /** A user's SOURCE, and a folder of root's on the same disk, where snapshots of it are kept for good. */
  async function lured() {
    const { source, snapshots, destination, a, b } = homeOf();
    sh(`rmdir "$1"`, snapshots);
    const other = subvolume(join(a.path, "roots"));
    const target = join(other, "snapshot");
    sh(
      `mkdir "$1"; cd "$1"; for i in 1 2 3; do btrfs -q subvolume snapshot -r "$2" "2020010$i-000000" >/dev/null; done
      mkdir plain; chmod 700 .`,
      target,
      source,
    );
    return { source, snapshots, destination, b, target, before: state(target) };
  }
  const link = (to: string, path: string, owner = USER) =>
    sh(`ln -s "$1" "$2"; chown -h "$3" "$2"`, to, path, owner);

  const lures: [what: string, folder: string, lay: (source: string, target: string) => void][] = [
    ["the snapshot folder", "snapshot", (source, target) => link(target, join(source, "snapshot"))],
    [
      "the snapshot folder, relative",
      "snapshot",
      (source) => link("../roots/snapshot", join(source, "snapshot")),
    ],
    [
      "a folder above it",
      "sub/snapshot",
      (source, target) => link(join(target, ".."), join(source, "sub")),
    ],
    [
      "a link to a link",
      "snapshot",
      (source, target) => (
        link(target, join(source, "other")),
        link("other", join(source, "snapshot"))
      ),
    ],
    [
      "a folder that is not there yet",
      "snapshot",
      (source, target) => link(join(target, "new"), join(source, "snapshot")),
    ],
    [
      "a plain folder of root's",
      "snapshot",
      (source, target) => link(join(target, "plain"), join(source, "snapshot")),
    ],
  ];
  for (const [what, folder, lay] of lures) {
    test(`of the owner of SOURCE lead nobody to a folder of root's: ${what}`, async () => {
      const { source, destination, target, before } = await lured();
      lay(source, target);
      for (const args of [
        ["run", "-f", folder, "-N", "1", source, destination],
        ["run", "-f", folder, "-N", "1", source],
        ["unpin", "--all", "-f", folder, source],
      ]) {
        const { status, stdout, stderr } = await endedRun(...args);
        expect({ args, refused: status === 1 || status === 2, stdout, stderr }).toEqual({
          args,
          refused: true,
          stdout: "",
          stderr,
        });
        expect(state(target)).toBe(before);
      }
      expect(existsSync(destination) ? snapshotNames(destination) : []).toEqual([]);
    });
  }

  /** Swaps a name for a link to elsewhere as soon as a program of that command line is seen, and soon back. */
  const SWITCH = `my ($folder, $pattern, $name, $to) = @ARGV; chdir $folder or die; print "ready\\n"; my %seen;
    $pattern = join "\\0", split " ", $pattern;
    while (1) { for my $pid (map { m{(\\d+)} } glob "/proc/[0-9]*") {
      next if $seen{$pid}; open my $file, "<", "/proc/$pid/cmdline" or next;
      local $/; index(<$file> // "", $pattern) == 0 or next;
      $seen{$pid} = 1; rename $name, "$name.real" and symlink $to, $name; select undef, undef, undef, 0.02;
      unlink $name; rename "$name.real", $name } }`;

  test("that take the snapshot folder's place when a snapshot is being taken lead it nowhere", async () => {
    const { source, snapshots, target, before } = await lured();
    mkdirSync(snapshots);
    const attacker = await attack(SWITCH, source, "btrfs subvolume snapshot", "snapshot", target);
    for (let round = 1; round <= 12; round++) {
      await endedRun("-T", "-p", `p${round}-`, source);
      expect([round, state(target)]).toEqual([round, before]);
    }
    await attacker.stop();
  });

  test("that take a destination's place when a backup is being received lead it nowhere", async () => {
    const { source, target, before, b } = await lured();
    const users = join(b.path, "users");
    sh(`mkdir -p "$1/backup"; chown "$2" "$1"`, users, USER);
    const attacker = await attack(SWITCH, users, "btrfs receive", "backup", target);
    for (let round = 1; round <= 8; round++) {
      await endedRun("-p", `p${round}-`, source, join(users, "backup"));
      expect([round, state(target)]).toEqual([round, before]);
    }
    await attacker.stop();
  });

  test("that take a snapshot's place when it is being sent have nothing else sent", async () => {
    const { source, snapshots, target, b } = await lured();
    const [secret, name] = [crypto.randomUUID(), "20250101-000000"];
    sh(
      `mkdir "$1"; echo "$3" >"$2/../secret"; btrfs -q subvolume snapshot -r "$2/.." "$2/roots" >/dev/null`,
      snapshots,
      target,
      secret,
    );
    sh(
      `btrfs -q subvolume snapshot -r "$1" "$2/$3" >/dev/null; chown "$4" "$2"`,
      source,
      snapshots,
      name,
      USER,
    );
    const attacker = await attack(SWITCH, snapshots, "btrfs send", name, join(target, "roots"));
    for (let round = 1; round <= 8; round++) {
      const places = [join(b.path, `backup-${round}`), join(b.path, `store-${round}`)];
      await endedRun("-S", source, places[0] as string, `raw://${places[1]}`);
      expect([round, sh(`grep -rl "$1" "$2" || :`, secret, b.path)]).toEqual([round, ""]);
    }
    await attacker.stop();
  });

  test("that are root's own lead to SOURCE, to the snapshot folder, and to a destination", async () => {
    const { source, snapshots, destination, a } = pair();
    const links = temporaryDirectory();
    const [from, to] = [join(links, "home"), join(links, "backup")];
    mkdirSync(destination);
    symlinkSync(source, from);
    symlinkSync(destination, to);
    await expectRun(0, ["-N", "1", from, to]);
    expect(snapshotNames(destination)).toEqual(snapshotNames(snapshots));
    expect(snapshotNames(snapshots).length).toBe(1);
    // One disk holds the snapshots of several sources, by root's links.
    const other = subvolume(join(a.path, "other"));
    mkdirSync(join(a.path, "snapshots"));
    symlinkSync("../snapshots", join(other, "snapshot"));
    await expectRun(0, ["-N", "1", other, join(to, "other")]);
    expect(snapshotNames(join(a.path, "snapshots")).length).toBe(1);
    expect(snapshotNames(join(destination, "other"))).toEqual(
      snapshotNames(join(a.path, "snapshots")),
    );
  });
});

describe("what is no name of a snapshot", () => {
  const NO_NAMES = ["..", ".", "", "./..", "../", "home/..", "../others"];

  /** Three at a time. */
  async function allRefused(flags: readonly string[], texts: readonly string[]) {
    const waiting = [...texts];
    const wrong: string[] = [];
    const one = async () => {
      for (let text; (text = waiting.pop()) !== undefined;) {
        const { status, stdout } = await answer(flags, text);
        const { name, args } = parseCommand(text);
        if (status !== 65 || stdout !== "") {
          wrong.push(`exit ${status}, ${stdout.length} bytes: ${name} ${JSON.stringify(args)}`);
        }
      }
    };
    await Promise.all([one(), one(), one()]);
    expect(wrong).toEqual([]);
  }

  test("is not sent: the read-only subvolume that the folder is in", async () => {
    const disk = filesystem();
    const root = subvolume(join(disk.path, "root"));
    const home = subvolume(join(root, "home"));
    const secret = crypto.randomUUID();
    sh(
      `echo "$3" >"$1/secret"; mkdir "$2/home"; btrfs -q subvolume snapshot -r "$2" "$2/20200101-000000" >/dev/null
      btrfs property set -ts "$1" ro true`,
      root,
      home,
      secret,
    );
    const [fsid, flags] = [fsidOf(home), ["--path", home, "--source", "--allow-read"]];
    // It is a key that works.
    expect(
      (
        await answer(
          flags,
          sent("send", "-q", home, fsid, "", "", "1", "20200101-000000", "", "", ""),
        )
      ).status,
    ).toBe(0);
    const hostile = NO_NAMES.flatMap((name) => [
      sent("send", "-q", home, fsid, "", "", "1", name, "", "", ""),
      sent("send", "-q", home, fsid, "", "2", "1", name, "", "", ""),
      sent("estimate", home, fsid, name, ""),
    ]);
    const parents = NO_NAMES.filter(Boolean).map((name) =>
      sent("send", "-q", home, fsid, "", "", "1", "20200101-000000", name, "", ""),
    );
    await allRefused(flags, [...hostile, ...parents]);
  });

  test("is not read: what others have on a disk that is mounted read-only", async () => {
    const disk = filesystem();
    const [mine, secret] = [join(disk.path, "laptop"), crypto.randomUUID()];
    sh(
      `btrfs -q subvolume create "$1" >/dev/null; mkdir "$1/home" "$2/others"; echo "$3" >"$2/others/$3"
      for d in "$1" "$2/others"; do btrfs -q subvolume create "$d/20200101-000000" >/dev/null; done
      mount -o remount,ro "$2"`,
      mine,
      disk.path,
      secret,
    );
    const [fsid, flags] = [fsidOf(mine), ["--path", mine, "--allow-read"]];
    // It is a key that works.
    expect(
      (await answer(flags, sent("listing", mine, fsid, "20200101-000000", LISTED))).status,
    ).toBe(0);
    const hostile = NO_NAMES.flatMap((name) => [
      sent("listing", mine, fsid, name, LISTED),
      sent("digest", mine, fsid, name),
      sent("send", "-q", mine, fsid, "", "", "1", name, "", "", ""),
      sent("estimate", mine, fsid, name, ""),
      sent("take", mine, fsid, name, `/others/${secret}`),
      sent("versions", mine, fsid, LISTED, `/others/${secret}`, name),
      sent("sizes", mine, fsid, `./${name}`),
      sent("received", mine, fsid, `./${name}`),
    ]);
    await allRefused(flags, hostile);
  });
});

describe("whoever works behind the fence", () => {
  /** A disk below a mount that tells others of mounts and unmounts, as `/` does where systemd runs. */
  function propagated() {
    const [top, file] = [temporaryDirectory(), join(temporaryDirectory(), "image")];
    sh(
      `mount -t tmpfs -o size=1M none "$1"; mount --make-shared "$1"; mkdir "$1/disk" "$1/later"
      truncate -s 256M "$2"; mkfs.btrfs -q "$2" >/dev/null 2>&1`,
      top,
      file,
    );
    const device = sh(`losetup -f --show "$1"`, file);
    const held = openSync(device, "r");
    sh(`losetup -d "$1"; mount "$1" "$2/disk"`, device, top);
    const gone = () => sh(`umount -R "$1" || umount -R -l "$1"`, top);
    return { top, device, gone: () => (gone(), closeSync(held)) };
  }

  for (const how of ["a run", "a guarded session"]) {
    test(`keeps no other disk busy: one is unmounted and formatted while a transfer waits in ${how}`, async () => {
      const { source, destination, b } = pair();
      const { top, device, gone } = propagated();
      try {
        let waiting: { finish: () => Promise<number | null> };
        if (how === "a run") {
          sh(`head -c 15M /dev/urandom >"$1/large"`, source);
          const running = start(["--rate-limit", "8m", source, destination], { group: true });
          waiting = { finish: async () => (await ended(running)).status };
          await waitFor(
            "the transfer",
            () =>
              existsSync(destination) &&
              [...subvolumes(destination).values()].some(({ readonly }) => !readonly),
          );
        } else {
          mkdirSync(destination);
          const receiving = session(
            ["--path", b.path],
            sent("receive", "-q", destination, fsidOf(destination), "", "1", "", "", "", "", ""),
          );
          const begin = command(
            "subvol",
            attribute.path("20200101-000000"),
            attribute.uuid(numberedUuid(5)),
            attribute.ctransid(1),
          );
          receiving.write(stream(begin));
          waiting = { finish: async () => (await receiving.end(command("end"))).status };
          await waitFor("the transfer", () => existsSync(join(destination, "20200101-000000")));
        }
        sh(
          `umount "$1/disk"; mkfs.btrfs -q -f "$2" >/dev/null; mount "$2" "$1/later"; umount "$1/later"`,
          top,
          device,
        );
        // It has waited all the time.
        expect([...subvolumes(destination).values()].some(({ readonly }) => !readonly)).toBe(true);
        expect(await waiting.finish()).toBe(0);
        expect(snapshotNames(destination).length).toBe(1);
      } finally {
        gone();
      }
    });
  }

  test("writes nothing where a disk is mounted read-only, even if it is writable elsewhere", async () => {
    const { source, b } = pair();
    const [view, folder] = [temporaryDirectory(), join(b.path, "backup")];
    sh(`mkdir "$1"; mount --bind "$2" "$3"; mount -o remount,bind,ro "$3"`, folder, b.path, view);
    try {
      const before = state(b.path);
      expect((await endedRun(source, join(view, "backup"))).status).toBe(1);
      const [there, flags] = [join(view, "backup"), ["--path", view]];
      const begin = command(
        "subvol",
        attribute.path("20200101-000000"),
        attribute.uuid(numberedUuid(5)),
        attribute.ctransid(1),
      );
      for (const text of [
        sent("create", join(there, "new"), fsidOf(there), ""),
        sent("create", there, fsidOf(there), ""),
        sent("receive", "-q", there, fsidOf(there), "", "1", "", "", "", "", ""),
      ]) {
        expect((await answer(flags, text, stream(begin, command("end")))).status).not.toBe(0);
      }
      expect(state(b.path)).toBe(before);
    } finally {
      sh(`umount "$1"`, view);
    }
  });

  test("leaves no mount behind, also when it is killed", async () => {
    const { source, destination } = pair();
    const mounts = () => readFileSync("/proc/self/mountinfo", "utf8");
    const before = mounts();
    sh(`head -c 10M /dev/urandom >"$1/large"`, source);
    const running = start(["--rate-limit", "5m", source, destination], { group: true });
    await waitFor(
      "the transfer",
      () =>
        existsSync(destination) &&
        [...subvolumes(destination).values()].some(({ readonly }) => !readonly),
    );
    process.kill(-running.pid, "SIGKILL");
    await running.finished;
    await expectRun(0, ["--wait", "30", source, destination]);
    expect(mounts()).toBe(before);
  });
  test("keeps the disk that it works on busy, for whoever would unmount it", async () => {
    const { source, destination, a, b } = pair();
    sh(`head -c 10M /dev/urandom >"$1/large"`, source);
    const running = start(["--rate-limit", "5m", source, destination], { group: true });
    await waitFor(
      "the transfer",
      () =>
        existsSync(destination) &&
        [...subvolumes(destination).values()].some(({ readonly }) => !readonly),
    );
    const unmounting = [a, b].map(({ path }) => spawnSync("umount", [path], { encoding: "utf8" }));
    expect((await ended(running)).status).toBe(0);
    for (const { status, stderr } of unmounting)
      expect([status, stderr]).toEqual([32, expect.stringMatching(/busy/)]);
    sh(`umount "$1" "$2"`, a.path, b.path);
  });

  test("needs no more of systemd than the unit gives: RestrictNamespaces=mnt", async () => {
    expect(readFileSync(join(ROOT, "scripts/btrfs-backup@.service"), "utf8")).toContain(
      "\nRestrictNamespaces=mnt\n",
    );
    const { source, destination } = homeOf();
    const told = await expectRun(0, ["-d", "-v", "debug", source, destination], {
      wrapper: restricted("mnt"),
    });
    expect(told.stderr).toMatch(/pipeline: nsenter -t \d+ -m/);
    expect(snapshotNames(destination).length).toBe(1);
  });
});

/**
 * Runs a command with the filter that systemd's RestrictNamespaces= makes of "mnt", or of "yes" (seccomp_restrict_namespaces() in
 * its seccomp-util.c): unshare, clone and setns with other namespaces are not permitted, nor setns with any.
 */
function restricted(how: "mnt" | "yes"): string[] {
  const others = 0x7e000000; // CLONE_NEWUSER, NEWPID, NEWNET, NEWIPC, NEWUTS and NEWCGROUP of linux/sched.h
  const script = `my ($mask, @command) = @ARGV; my ($allow, $deny) = (0x7fff0000, 0x00050001);
    my $filter = join "", map { pack "SCCL", @$_ } [0x20,0,0,0], [0x15,3,0,272], [0x15,2,0,56], [0x15,4,0,308],
      [6,0,0,$allow], [0x20,0,0,16], [0x45,4,0,$mask], [6,0,0,$allow], [0x20,0,0,24], [0x15,1,0,0], [0x45,0,1,$mask],
      [6,0,0,$deny], [6,0,0,$allow];
    my $program = pack "Sx6P", length($filter) / 8, $filter;
    syscall(157, 38, 1, 0, 0, 0) == 0 && syscall(157, 22, 2, $program) == 0 or die "prctl: $!"; exec @command;`;
  return ["perl", "-e", script, String(how === "mnt" ? others : others | 0x20000)];
}

describe("where the fence cannot be had", () => {
  /** A mount(8) that accepts an option which it does not know: it takes it out, and succeeds. */
  function forgetful(option: string): { env: Record<string, string> } {
    const tools = temporaryDirectory();
    const script = `#!/bin/bash\nargs=(); for one; do args+=("\${one//,${option}/}"); done; exec ${sh("command -v mount")} "\${args[@]}"\n`;
    writeFileSync(join(tools, "mount"), script, { mode: 0o755 });
    return { env: { PATH: `${tools}:${process.env["PATH"]}` } };
  }
  const ways: Record<string, () => { env?: Record<string, string>; wrapper?: string[] }> = {
    "for want of a mount namespace": () => ({ wrapper: restricted("yes") }),
    "since mount forgets nosymfollow": () => forgetful("nosymfollow"),
    "since mount forgets nodev": () => forgetful("nodev"),
  };
  for (const [why, how] of Object.entries(ways)) {
    test(`${why}, places of root alone are used as ever, others are refused, and guard does not serve`, async () => {
      const { source, snapshots, destination, b } = pair();
      const [options, log] = [how(), join(temporaryDirectory(), "log")];
      sh(`chmod 755 "$1"`, b.path);
      await expectRun(0, [source, destination], options);
      const tools = temporaryDirectory();
      writeFileSync(
        join(tools, "btrfs"),
        `#!/bin/sh\n[ "$1" != receive ] || echo "$*" >>"${log}"\nexec ${sh("command -v btrfs")} "$@"\n`,
        { mode: 0o755 },
      );
      const PATH = `${tools}:${options.env?.["PATH"] ?? process.env["PATH"]}`;
      await nextSecond();
      await expectRun(0, ["-N", "1", "-n", "1", source, destination], {
        ...options,
        env: { PATH },
      });
      expect(snapshotNames(destination)).toEqual(snapshotNames(snapshots));
      expect(snapshotNames(destination).length).toBe(1);
      expect(readFileSync(log, "utf8")).toBe("receive -q -C .\n"); // the difference, in a chroot
      await expectRun(0, ["restore", destination, join(b.path, "again")], options);

      // The snapshot folder, a destination and a store in somebody's directory.
      const users = join(b.path, "users");
      sh(`mkdir "$1"; chown "$2" "$1"`, users, USER);
      const before = state(b.path);
      for (const place of [join(users, "backup"), `raw://${join(users, "raw")}`]) {
        const result = await expectRun(1, ["-S", source, place], options);
        expect(result.stderr).toMatch(/others can change .*\/users, .*: chown .*\/users/);
      }
      const theirs = homeOf();
      const refused = await run(["-T", theirs.source], options);
      expect([refused.status === 0, refused.stderr]).toEqual([
        false,
        expect.stringContaining("others can change"),
      ]);
      expect(readdirSync(theirs.snapshots)).toEqual([]);
      expect(state(b.path)).toBe(before);

      const [program = "", ...words] = [
        ...(options.wrapper ?? []),
        join(ROOT, "dist/btrfs-backup"),
      ];
      const served = spawnSync(program, [...words, "guard", "--path", b.path], {
        encoding: "utf8",
        input: "",
        env: {
          ...process.env,
          ...options.env,
          SSH_ORIGINAL_COMMAND: sent("create", join(b.path, "new"), fsidOf(b.path), ""),
        },
      });
      expect(served.status).not.toBe(0);
      expect(served.stderr).toMatch(/^[^\n]*(mount namespace|no mount can be had)[^\n]*\n$/);
      expect(state(b.path)).toBe(before);
    });
  }
});

describe("random commands over sshd", () => {
  /** A way to run the program that writes down what it sends over ssh. */
  function recorder() {
    const log = join(temporaryDirectory(), "log");
    const tools = temporaryDirectory();
    const script = `#!/bin/sh\nfor last; do :; done\nprintf '%s\\0' "$last" >>${log}\nexec ${sh(
      "command -v ssh",
    )} "$@"\n`;
    writeFileSync(join(tools, "ssh"), script, { mode: 0o755 });
    const env = { PATH: `${tools}:${process.env["PATH"]}` };
    const texts = () =>
      readFileSync(log, "utf8")
        .split("\0")
        .filter((text) => /^(sh|nsenter|unshare) /.test(text));
    return {
      run: (...args: string[]) => expectRun(0, args, { env }),
      recorded: () => [...new Set(texts())].map(parseCommand),
    };
  }

  /** Everything on a disk but what is below those of its folders. */
  const outside = (disk: string, ...folders: string[]) =>
    sh(
      `cd "$1"; shift; prune=(); names=(-e '^$')
      for p; do prune+=(-path "./$p" -prune -o); names+=(-e "path $p/"); done
      find . "\${prune[@]}" -inum 2 -prune -o -printf '%p %y %m %U %s %l\\n' | sort
      find . "\${prune[@]}" -type f -exec sha256sum {} + | sort
      btrfs subvolume list -u -q -R . | sed 's/gen [0-9]* //' | grep -v "\${names[@]}" || :`,
      disk,
      ...folders,
    ).split("\n");
  /** What a key that may only add must leave as it is: complete backups, and stored streams. */
  const kept = (folder: string) => [
    ...[...subvolumes(join(folder, "home"))]
      .filter(([, one]) => one.readonly && one.receivedUuid !== null)
      .map(([name, { id, uuid, receivedUuid }]) => [name, id, uuid, receivedUuid].join()),
    ...sh(`cd "$1/raw"; sha256sum *.btrfs *.sha256`, folder).split("\n"),
  ];

  type Key = { readonly master: ChildProcess; readonly words: string[] };
  /** A connection of a guarded key, for many sessions. */
  async function connected(options: readonly string[], url: string): Promise<Key> {
    const { username, hostname, port } = new URL(url);
    const socket = `/tmp/fence-${crypto.randomUUID()}`; // a socket's path must be short
    const words = [
      "-l",
      username,
      "-p",
      port,
      "-o",
      `ControlPath=${socket}`,
      ...options.map((one) => (one === "--ssh-opt" ? "-o" : one)),
      hostname,
    ];
    const master = ours(spawn("ssh", ["-M", "-N", ...words], { stdio: "ignore" }));
    await waitFor("the connection", () => existsSync(socket));
    return { master, words };
  }
  type Told = {
    readonly text: string;
    readonly status: number | null;
    readonly stdout: Buffer;
    readonly stderr: string;
    readonly late: boolean;
  };
  /** One session, which is ended after a while. */
  const send = ({ words }: Key, text: string, input: Buffer) =>
    new Promise<Told>((done) => {
      const child = ours(spawn("ssh", [...words, "--", text]));
      const [stdout, stderr]: [Buffer[], Buffer[]] = [[], []];
      let late = false;
      const timer = setTimeout(() => (late = child.kill("SIGKILL")), 20_000);
      child.stdout?.on("data", (data: Buffer) => stdout.push(data));
      child.stderr?.on("data", (data: Buffer) => stderr.push(data));
      child.stdin?.on("error", () => {});
      child.stdin?.end(input);
      child.on("close", (status) => {
        clearTimeout(timer);
        done({
          text,
          status,
          stdout: Buffer.concat(stdout),
          stderr: Buffer.concat(stderr).toString(),
          late,
        });
      });
    });

  /** Whether a secret is in what was told, as it is, in base64, or compressed. */
  function tells(stdout: Buffer, secret: string): boolean {
    const unzipped = stdout.subarray(0, 4).equals(Buffer.from([0x28, 0xb5, 0x2f, 0xfd]))
      ? spawnSync("zstd", ["-dc"], { input: stdout }).stdout
      : Buffer.alloc(0);
    return [stdout, unzipped, Buffer.from(stdout.toString("latin1"), "base64")].some((bytes) =>
      bytes.includes(secret),
    );
  }

  test("change nothing beside what their keys are for, tell nothing of others, and all end", async () => {
    const random = seeded();
    const below = (n: number) => Math.floor(random() * n);
    const pick = <T>(all: readonly T[]) => all[below(all.length)] as T;
    const server = await sshServer();
    server.user("thief", "/bin/dash"); // what bash reads at each login takes long
    const guarded = server.guarded;
    const url = (path: string) => server.url(path, "thief");
    const secret = crypto.randomUUID();

    // Several machines on a disk; on one that is mounted read-only, and in a subvolume that is read-only, too.
    const { source, snapshots, a, b } = pair();
    const closed = filesystem();
    const shelf = subvolume(join(b.path, "shelf"));
    const other = subvolume(join(a.path, "other"));
    sh(`echo "$2" >"$1/$2"`, other, secret);
    const disks = [b.path, closed.path, shelf];
    const folders = disks.map((disk) => join(disk, "phone"));
    const script = `cd "$1"; mkdir -p flat laptop/home laptop/raw tablet/home tablet/raw phone/home phone/raw
      echo "$2" >"phone/$2"; echo "$2" >"secret-$2"`;
    for (const disk of disks) sh(script, disk, secret);
    const into = (folder: string) => [join(folder, "home"), `raw://${join(folder, "raw")}`];
    await expectRun(0, ["-q", other, ...folders.flatMap(into)]);

    const [{ run, recorded }, pull] = [recorder(), recorder()];
    const all = guarded("--path", join(b.path, "laptop"), "--allow-read", "--allow-delete");
    const [home, raw] = into(join(b.path, "laptop")).map((place) =>
      place.replace("raw://", ""),
    ) as [string, string];
    for (const [prefix, how] of [
      ["", ["--compress", "zstd"]],
      ["p-", ["--resume"]],
    ] as const) {
      writeFileSync(join(source, `file${prefix}`), prefix);
      await run(...all, "-p", prefix, ...how, source, url(home), `raw+${url(raw)}`);
    }
    const [name = ""] = snapshotNames(snapshots);
    await run("verify", ...all, "-p", "", source, url(home));
    await run("restore", ...all, "-p", "", `raw+${url(raw)}`, join(a.path, "restored"));
    await run(
      "versions",
      ...all,
      "-p",
      "",
      join(source, "file"),
      url(home),
      "--get",
      name,
      "--to",
      join(a.path, "again"),
    );
    const pulling = guarded("--path", source, "--source", "--allow-read");
    await pull.run(...pulling, "-p", "s-", url(source), join(b.path, "pulled"));
    await expectRun(0, [
      "-q",
      "-S",
      "-p",
      "",
      source,
      ...into(join(b.path, "tablet")),
      ...disks.slice(1).map((disk) => join(disk, "flat")),
    ]);
    sh(`btrfs property set -ts "$1" ro true; mount -o remount,ro "$2"`, shelf, closed.path);

    // What these runs had no need of.
    const fsid = `${fsidOf(home)}/`;
    const unasked: [string, ...string[]][] = [
      ["listing", home, fsid, name, LISTED],
      ["take", home, fsid, name, "/file"],
      ["estimate", home, fsid, name, ""],
      ["sizes", home, fsid, `./${name}`],
      ["received", home, fsid, `./${name}`],
      ["delete", "", "", home, fsid, `./${name}`],
      ["discard", home, fsid, "", name, "", "", ""],
      ["locate", join(home, "file")],
      ["show", home, fsid],
      ["drop", raw, fsid, "", ...readdirSync(raw).filter((file) => file.endsWith(".btrfs"))],
      ["digest", home, fsid, name],
      ["send", "-q", home, fsid, "", "", "1", name, "", "", ""],
      ["create", join(home, "new"), fsid, "q-"],
    ];
    const real = [
      ...recorded(),
      ...unasked.map(([verb, ...args]) => ({ name: verb, sudo: false, args })),
    ];
    const pulled = pull.recorded();
    const verbs = [...new Set([...real, ...pulled].map((one) => one.name))];
    console.log(`${real.length + pulled.length} real commands: ${verbs.join(" ")}`);
    /** A path that a key is for, the place there that stands for `home`, and the verbs that it may use. */
    const reading = [
      "open",
      "send",
      "estimate",
      "digest",
      "listing",
      "take",
      "versions",
      "sizes",
      "received",
      "locate",
    ];
    const adding = [
      "open",
      "create",
      "record",
      "receive",
      "kept",
      "tidy",
      "discard",
      "store",
      "commit",
      "drop",
    ];
    const users: { path: string; home: string; may: string[]; options: string[] }[] = [
      {
        path: join(b.path, "laptop"),
        home,
        may: [...reading, ...adding, "delete", "fetch"],
        options: all,
      },
      {
        path: join(b.path, "tablet"),
        home: join(b.path, "tablet/home"),
        may: adding,
        options: guarded("--path", join(b.path, "tablet")),
      },
      {
        path: source,
        home: snapshots,
        may: ["snapshot", "show", "delete", "record", "create", ...reading, "send", "snapshot"],
        options: pulling,
      },
      ...disks
        .slice(1)
        .map((disk) => join(disk, "flat"))
        .map((path) => ({
          path,
          home: path,
          may: reading,
          options: guarded("--path", path, "--allow-read"),
        })),
    ];
    const keys = await Promise.all(
      users.map(async (user) => ({ ...user, key: await connected(user.options, url("/")) })),
    );
    const places = [
      ...disks.flatMap((disk) =>
        ["laptop", "tablet", "phone", "flat"].map((one) => join(disk, one)),
      ),
      ...disks,
      source,
      other,
      "/",
    ];
    const nasty = [
      "",
      ".",
      "..",
      "../phone",
      "../phone/home",
      "/",
      "/phone",
      `/phone/${secret}`,
      `/${secret}`,
      "/etc/passwd",
      `../${name}`,
      `./${name}`,
      name,
      "20300101-000000",
      "./20300101-000000",
      `${name}/..`,
      "-h",
      "--",
      "-rf",
      "*",
      "$(id)",
      "`id`",
      "a\\b",
      "it's",
      "!",
      "\x1b[2J",
      "\u202e",
      "0",
      "1",
      "2",
      "-1",
      "4194304",
      "x".repeat(300),
      ".btrfs-backup.json",
      ".btrfs-backup..lock",
      ".btrfs-backup.restoring",
    ];
    const noNames = ["..", "..", ".", "", "../..", `../${name}`, `${name}/..`];
    const words = [
      ...new Set(real.flatMap(({ args }) => args)),
      ...nasty,
      ...places,
      ...places.map((place) => join(place, "home")),
    ];
    const whole = streamOf(join(snapshots, name));
    const fresh = command(
      "subvol",
      attribute.path("20300101-000000"),
      attribute.uuid(numberedUuid(9)),
      attribute.ctransid(1),
    );
    const streams = [
      whole,
      streamOf(join(snapshots, name), null, "--proto", "2"),
      whole.subarray(0, whole.length / 2),
      stream(fresh, command("end")),
    ];

    const DATED = /^(\.\/)?([a-z]-)?\d{8}-\d{6}$/;
    /** A command that was really sent, for another place perhaps, with a few things wrong. */
    function mutated({ path, home: place, may }: (typeof keys)[0]): string {
      const chosen = pick(random() < 0.1 ? verbs : may);
      const [asked, unasked] = path === source ? [pulled, real] : [real, pulled];
      const called = (all: typeof real) => all.filter((one) => one.name === chosen);
      const from = [called(asked), called(unasked), real].find(
        (all) => all.length > 0,
      ) as typeof real;
      const { name: verb, sudo, args: old } = pick(from);
      let args = old.map((word) => word.replace(home, place).replace(join(b.path, "laptop"), path));
      // The holders of locks are gone.
      args = args.map((word) =>
        /^[0-9a-f]{10,16}\/\d*$/.test(word) ? `${fsidOf(place)}/` : word.replace(/^\d{2,8}$/, "1"),
      );
      const renamed = random() < 0.3;
      if (renamed)
        args = args.map((word) =>
          DATED.test(word) ? word.replace(/[^/]*$/, pick(noNames)) : word,
        );
      for (let changes = pick(renamed ? [0, 0, 1] : [0, 1, 1, 1, 2, 4]); changes > 0; changes--) {
        const at = below(args.length + 1);
        const how = below(12);
        if (how < 8) args[Math.min(at, args.length - 1)] = pick(random() < 0.4 ? nasty : words);
        else if (how === 8) args.splice(at, 1);
        else if (how === 9) args.splice(at, 0, pick(words));
        else if (how === 10)
          args[at] =
            `${args[at] ?? ""}${pick(["/..", "/.", "/", " ", "x", "'", "\\", `/${name}`])}`;
        else args = args.map((word) => word.replace(path, pick(places)));
      }
      let text = commandFor(
        { ...HOST, sudo },
        { name: random() < 0.05 ? pick(verbs) : verb, script: "exit 0" },
        args,
      );
      if (random() < 0.1) {
        const at = below(text.length);
        text =
          text.slice(0, at) +
          pick(["'", "\\", ";", "\n", " ", "''", "\x7f", "$(id)", text.slice(below(text.length))]) +
          text.slice(at + below(3));
      }
      return text.replaceAll("\0", "").slice(0, 100_000);
    }
    function bytes(): Buffer {
      const chosen = Buffer.from(random() < 0.4 ? Buffer.alloc(0) : pick(streams));
      for (
        let changes = random() < 0.5 ? 0 : below(5);
        changes > 0 && chosen.length > 0;
        changes--
      ) {
        chosen[below(chosen.length)] = below(256);
      }
      return random() < 0.2 ? spawnSync("zstd", ["-qc"], { input: chosen }).stdout : chosen;
    }

    const look = () => ({
      b: outside(b.path, "laptop", "tablet"),
      closed: outside(closed.path),
      a: outside(a.path, "home"),
      live: sh(`cd "$1/plain"; find . -type f -exec sha256sum {} + | sort`, source),
    });
    const before = look();
    const tablet = kept(join(b.path, "tablet"));
    const many = Array.from({ length: soak(200) }, () => {
      const one = pick(keys);
      return { key: one.key, path: one.path, text: mutated(one), input: bytes() };
    });
    const answers: (Told & { path: string })[] = [];
    const sender = async () => {
      for (let next; (next = many.pop()) !== undefined;) {
        answers.push({ path: next.path, ...(await send(next.key, next.text, next.input)) });
      }
    };
    await Promise.all([1, 2, 3, 4].map(sender));
    for (const { key } of keys) key.master.kill();

    const having = (test: (one: Told) => boolean) =>
      answers
        .filter(test)
        .map(
          ({ path, text, status, stderr, stdout }) =>
            `${path}: … ${text.slice(-250)}: exit ${status}, ${stdout.length} bytes, ${stderr.slice(0, 300)}`,
        );
    console.log(
      `${answers.length} commands: ${having((one) => one.status === 0).length} succeeded, ${
        having((one) => one.status === 65).length
      } were refused`,
    );
    const naming = /^(send|estimate|digest|listing|take|versions|sizes|received|delete)$/;
    const astray = (text: string) =>
      naming.test(parseCommand(text).name) &&
      parseCommand(text).args.some((word) => word.split("/").includes(".."));
    expect({
      late: having(({ late }) => late),
      telling: having(({ stdout }) => tells(stdout, secret)),
      astray: having(({ text, status }) => status === 0 && astray(text)),
      traces: having(({ stderr }) => /^\s+at |\bError:/m.test(stderr)),
    }).toEqual({ late: [], telling: [], astray: [], traces: [] });
    expect(look()).toEqual(before);
    expect(kept(join(b.path, "tablet"))).toEqual(expect.arrayContaining(tablet));
  });
});

describe("a thief who has read the program", () => {
  const HEADER = '{"/": 1';
  /** A folder for a key, with a backup in it. */
  async function served() {
    const { source, b } = pair();
    const mine = join(b.path, "laptop");
    const home = join(mine, "home");
    mkdirSync(mine, { mode: 0o700 });
    await expectRun(0, [source, home]);
    return { source, b, mine, home, record: join(home, ".btrfs-backup.json") };
  }
  const owner = { uuid: numberedUuid(9), host: "evil", path: "/evil" };

  test("wipes no record, and writes no line without a name", async () => {
    const { mine, home, record } = await served();
    const before = readFileSync(record, "utf8");
    for (const flags of [
      ["--path", mine],
      ["--path", mine, "--source"],
    ]) {
      for (const words of [
        ["", ',"": ', ""],
        ["", "", ""],
        ["", ',"": ', JSON.stringify({ owner })],
        [HEADER, "", ""],
        [HEADER, ',"": ', ""],
        [HEADER, ',"/": ', "{}"],
        [HEADER, ',"": ', JSON.stringify({ owner })],
      ]) {
        expect([
          words,
          (await answer(flags, sent("record", home, fsidOf(home), ...words))).status,
        ]).toEqual([words, 65]);
        expect(readFileSync(record, "utf8")).toBe(before);
      }
    }
  });

  test("does not make the server take his chain for a source's, nor one prefix stop prune for all", async () => {
    const { b, mine, home } = await served();
    const filesystem = sh(`btrfs filesystem show "$1" | sed -n 's/.*uuid: //p'`, b.path);
    const [backup] = [...subvolumes(home).values()];
    for (const uuid of [filesystem, backup?.uuid as string]) {
      const text = sent(
        "record",
        home,
        fsidOf(home),
        HEADER,
        ',"x-": ',
        JSON.stringify({ owner: { ...owner, uuid } }),
      );
      expect((await answer(["--path", mine], text)).status).toBe(65);
    }
    // A stream without a UUID would leave a snapshot that was never received.
    const P = attribute.path;
    const nobody = "00000000-0000-0000-0000-000000000000";
    const streams = [nobody, numberedUuid(7)].map((one) =>
      stream(
        command("subvol", P("x-20300101-000000"), attribute.uuid(one), attribute.ctransid(1)),
        command("end"),
      ),
    );
    const receive = sent("receive", "-q", home, fsidOf(home), "", "1", "x-", "", "", "", "");
    expect((await answer(["--path", mine], receive, streams[0])).status).toBe(65);
    expect((await answer(["--path", mine], receive, streams[1])).status).toBe(0);
    sh(
      `btrfs -q subvolume snapshot -r "$1/x-20300101-000000" "$1/y-20300101-000000" >/dev/null`,
      home,
    );
    await expectRun(0, ["prune", "-n", "1", home]);
  });

  test("has no name that is not text, which would be another's for who reads it as text", async () => {
    const { mine, home } = await served();
    for (const name of ["\xff20300101-000000", "\xfe20300101-000000"]) {
      const bytes = stream(
        command(
          "subvol",
          attribute.path(name),
          attribute.uuid(numberedUuid(7)),
          attribute.ctransid(1),
        ),
        command("end"),
      );
      const receive = sent("receive", "-q", home, fsidOf(home), "", "1", "\ufffd", "", "", "", "");
      expect((await answer(["--path", mine], receive, bytes)).status).toBe(65);
      expect((await answer(["--path", mine], receive.replace("\ufffd", ""), bytes)).status).toBe(
        65,
      );
    }
    expect(snapshotNames(home).length).toBe(1);
  });

  test("--max-bytes counts leftovers, below a link as well, and takes no stream that it could not count", async () => {
    const { mine, home } = await served();
    const link = join(temporaryDirectory(), "link");
    symlinkSync(mine, link);
    const flags = ["--path", link, "--max-bytes", "4m"];
    const P = attribute.path;
    const data = Array.from({ length: 96 }, (_, i) =>
      command("write", P("x"), attribute.offset(i * 32768), attribute.data("e".repeat(32768))),
    );
    const begun = (name: string, n: number) =>
      stream(
        command("subvol", P(name), attribute.uuid(numberedUuid(n)), attribute.ctransid(1)),
        command("mkfile", P("x"), attribute.ino(300)),
        ...data,
      );
    const uncounted = sent("receive", "-q", home, fsidOf(home), "", "1", "", "", "", "", "");
    expect((await answer(flags, uncounted, begun("20300101-000000", 20))).status).toBe(65);
    for (const [i, prefix] of ["a-", "b-", "c-"].entries()) {
      const name = `${prefix}20300101-000000`;
      const text = sent(
        "receive",
        "-q",
        home,
        fsidOf(home),
        "",
        "1",
        prefix,
        HEADER,
        `,"${prefix}": `,
        `{"receiving":"${name}",`,
        JSON.stringify({ owner }).slice(1),
      );
      expect((await answer(flags, text, begun(name, 30 + i))).status).not.toBe(0);
    }
    // However much of each was written when it was ended: together no more than that, and no room for what comes.
    const written = [...subvolumes(home).keys()]
      .filter((name) => name.includes("2030"))
      .map((name) => statSync(join(home, name, "x"), { throwIfNoEntry: false })?.size ?? 0);
    expect(written.length).toBeGreaterThan(0);
    expect(written.reduce((sum, bytes) => sum + bytes, 0)).toBeLessThanOrEqual(4 << 20);
  });
});

describe("who owns SOURCE, with root's snapshot folder in it,", () => {
  test("has no other subvolume deleted or sent by a folder that takes its place", async () => {
    const { source, snapshots, a, b } = pair();
    const victim = subvolume(join(a.path, "roots"));
    writeFileSync(join(victim, "secret"), "of root");
    sh(
      `chmod 700 "$1"; btrfs -q subvolume snapshot -r "$1" "$1.ro" >/dev/null; mkdir -m 700 "$2"`,
      victim,
      snapshots,
    );
    sh(`chown "$2" "$1"; mkdir "$1/evil"; chown "$2" "$1/evil"`, source, USER);
    const names = Array.from(
      { length: 12 },
      (_, i) => `202501${String(i + 1).padStart(2, "0")}-000000`,
    );
    for (const [i, name] of names.entries()) {
      sh(
        `btrfs -q subvolume snapshot -r "$1" "$2/$3" >/dev/null; ln -s "$4" "$1/evil/$3"`,
        source,
        snapshots,
        name,
        i < 6 ? victim : `${victim}.ro`,
      );
    }
    const exchange = `chdir $ARGV[0] or die; print "ready\\n"; my ($x, $y) = ("snapshot", "evil"); while (1) { syscall(316, -100, $x, -100, $y, 2) }`;
    const attacker = await attack(exchange, source);
    for (let round = 1; round <= 6; round++) {
      await endedRun(
        "-S",
        "--newest-only",
        "-N",
        String(Math.max(1, 12 - round * 2)),
        source,
        join(b.path, `${round}`),
        `raw://${b.path}/raw${round}`,
      );
      expect([
        round,
        existsSync(join(victim, "secret")),
        sh(`grep -rl "of root" "$1" || :`, b.path),
      ]).toEqual([round, true, ""]);
    }
    await attacker.stop();
  });
});

test("what stands at the top of a filesystem is deleted there, many at once", async () => {
  const { source, a, b } = pair();
  for (let n = 1; n <= 6; n++)
    sh(
      `mkdir -p "$1/snapshot"; btrfs -q subvolume snapshot -r "$1" "$1/snapshot/2026010$2-000000" >/dev/null`,
      source,
      String(n),
    );
  await expectRun(0, ["-S", "-p", "", source, b.path]);
  await expectRun(0, ["prune", "-n", "1", b.path]);
  expect(snapshotNames(b.path)).toEqual(["20260106-000000"]);
  // A prefix that looks like a line of btrfs's own.
  const odd = "x top level 5 path ";
  for (let n = 1; n <= 6; n++)
    sh(
      `btrfs -q subvolume snapshot -r "$1" "$1/snapshot/$3""2026010$2-000000" >/dev/null`,
      source,
      String(n),
      odd,
    );
  await expectRun(0, ["-S", "-p", odd, "-N", "1", "-n", "1", source, join(b.path, "odd")]);
  expect([
    snapshotNames(join(b.path, "odd"), odd),
    snapshotNames(join(source, "snapshot"), odd),
  ]).toEqual([[`${odd}20260106-000000`], [`${odd}20260106-000000`]]);
  expect(a.path).not.toBe(b.path);
});
