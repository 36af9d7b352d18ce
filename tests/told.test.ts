// What goes wrong is told once, by its cause, and with the way out; what cannot be wrong is done.

import { describe, expect, test } from "bun:test";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readFileSync,
  renameSync,
  rmSync,
  utimesSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import {
  events,
  expectRun,
  expectSound,
  filesystem,
  nextSecond,
  pair,
  run,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  subvolume,
  subvolumes,
  temporaryDirectory,
  transfers,
  unmount,
  logged,
} from "./support/rig.ts";

describe("who is not root", () => {
  const nobody = {
    wrapper: ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"],
    env: { HOME: "/tmp" },
    cwd: "/",
  };

  test("reads that it takes root, in each command, and each place once", async () => {
    const { source, destination, a } = pair();
    writeFileSync(join(source, "file"), "x");
    await expectRun(0, [source, destination]);
    const commands = [
      [source, destination],
      ["list", source],
      ["list", destination],
      ["verify", source, destination],
      ["versions", join(source, "file")],
      ["prune", "-n", "1", destination],
      ["restore", destination, join(a.path, "again")],
      ["copy", destination, join(a.path, "copy")],
      ["unpin", "--all", source],
    ];
    const wrong: unknown[] = [];
    for (const mode of [0o755, 0o700]) {
      chmodSync(source, mode);
      for (const command of commands) {
        const { status, stderr } = await run(command, nobody);
        const [line = ""] = stderr.split("\n").filter((one) => one.startsWith("[error]"));
        const place = /\/\S+?(?=:)/.exec(line)?.[0] ?? "";
        const isFine =
          status === 1 &&
          line.endsWith(
            `: Permission denied: this needs root, as sudo gives it (see "btrfs-backup help without-root")`,
          ) &&
          !/can't cd|btrfs-backup:open/.test(stderr);
        if (!isFine || place === "" || line.split(`${place}:`).length !== 2)
          wrong.push([mode, command, status, stderr]);
      }
    }
    expect(wrong).toEqual([]);
  });

  test("and on another host as well", async () => {
    const { source, destination } = pair();
    mkdirSync(destination, { mode: 0o700 });
    const { options, url, user } = await sshServer();
    user("plain", "/bin/sh", 4713);
    const { stderr } = await expectRun(1, [...options, source, url(destination, "plain")]);
    expect(stderr).toContain(`[error] ${url(destination, "plain")}: Permission denied`);
  });
});

test("a source that is full is told once, not for each destination", async () => {
  const { a } = pair();
  const small = filesystem({ size: "120M" });
  const source = subvolume(join(small.path, "home"));
  snapshotAs(source, "20260101-000000");
  sh(
    `head -c 300M /dev/zero >"$1/fill" 2>/dev/null || :; for i in $(seq 3000); do head -c 2000 /dev/urandom >"$1/$i" 2>/dev/null || break; done; sync; for i in $(seq 5000 9000); do head -c 100 /dev/urandom >"$1/$i" 2>/dev/null || break; done; sync`,
    source,
  );
  const { stderr } = await expectRun(1, ["-S", source, join(a.path, "one"), join(a.path, "two")]);
  expect(logged(stderr).match(/cannot write \.btrfs-backup\.json/g)?.length).toBe(1);
});

describe("chattr +i on a source's top, which its snapshots have, too:", () => {
  test.each([[[]], [["-w"]]])(
    "a deletion that fails leaves them read-only, and tells the cause (%p)",
    async (options) => {
      const { source, snapshots } = pair();
      snapshotAs(source, "20260101-000000");
      sh(`chattr +i "$1"`, source);
      try {
        const first = await run(["-N", "1", ...options, source]);
        expect([
          first.status,
          /20260101-000000 has the attribute i or a \(lsattr -d\).*chattr -ia/.test(first.stderr),
        ]).toEqual([0, false]); // that one was taken before
        await nextSecond();
        const second = await expectRun(1, ["-N", "1", ...options, source]);
        expect(second.stderr).toMatch(
          /\/snapshot\/\d{8}-\d{6} has the attribute i or a \(lsattr -d\), as its source had: btrfs property set -f NAME ro false, chattr -ia NAME, and delete it/,
        );
        expect([...subvolumes(snapshots).values()].map(({ readonly }) => readonly)).toEqual([
          true,
          true,
        ]);
        // Its words are the way out.
        const [oldest] = snapshotNames(snapshots) as [string];
        sh(
          `cd "$1"; btrfs property set -f -ts "$2" ro false; chattr -ia "$2"; btrfs -q subvolume delete "$2" >/dev/null`,
          snapshots,
          oldest,
        );
      } finally {
        sh(
          `chattr -i "$1"; for s in "$1"/snapshot/2*; do btrfs property set -f -ts "$s" ro false; chattr -i "$s"; done`,
          source,
        );
      }
    },
  );
});

describe("directories above a new destination", () => {
  test("are made on a btrfs of its own, here, over ssh and with a key", async () => {
    const { source, snapshots, b } = pair();
    const { options, guarded, url } = await sshServer();
    await expectRun(0, [source, join(b.path, "a/b/home")]);
    await expectRun(0, [...options, "-S", source, url(join(b.path, "c/d/home"))]);
    const laptops = join(filesystem().path, "laptops");
    mkdirSync(laptops);
    await expectRun(0, [
      ...guarded("--path", laptops),
      "-S",
      source,
      url(join(laptops, "e/f/home")),
    ]);
    await expectRun(0, ["-S", source, `raw://${join(b.path, "g/h")}`]);
    for (const place of [
      join(b.path, "a/b/home"),
      join(b.path, "c/d/home"),
      join(laptops, "e/f/home"),
    ])
      expectSound(place, snapshots);
  });

  test("are not made where that could be a mount that was forgotten, and the message says what to type", async () => {
    const { source, a } = pair();
    const disk = filesystem();
    const plain = temporaryDirectory();
    for (const [parent, why] of [
      [plain, "is not on btrfs"],
      [a.path, "is on the filesystem of SOURCE"],
    ] as const) {
      const place = join(parent, "not/there/home");
      for (const kind of ["", "raw://"]) {
        const { stderr } = await expectRun(1, [source, `${kind}${place}`]);
        expect(stderr).toContain(
          `no such directory: ${join(parent, "not/there")} (is the disk mounted? ${parent} ${why}; if it is to be made: mkdir -p ${join(parent, "not/there")})`,
        );
        expect(existsSync(join(parent, "not"))).toBe(false);
      }
    }
    const place = join(disk.path, "not/there/home");
    // A machine whose root filesystem is a btrfs.
    const root = join(filesystem().path, "root");
    mkdirSync(join(root, "mnt/disk"), { recursive: true });
    const script = `mount --bind "${root}" "${root}"; for d in /*; do
      if [ -L "$d" ]; then cp -P "$d" "${root}$d"; elif [ -d "$d" ] && [ "$d" != /mnt ]; then mkdir -p "${root}$d"; mount --rbind "$d" "${root}$d"; fi
    done; exec chroot "${root}" "$@"`;
    const { stderr: rooted } = await expectRun(1, [source, "/mnt/disk/not/there/home"], {
      wrapper: ["unshare", "-m", "bash", "-c", script, "sh"],
    });
    expect(rooted).toContain(
      "(is the disk mounted? /mnt/disk is on the root filesystem; if it is to be made: mkdir -p /mnt/disk/not/there)",
    );
    expect(existsSync(join(root, "mnt/disk/not"))).toBe(false);
    // Nor with --dry-run, which says so.
    const { stderr } = await run(["--dry-run", source, place]);
    expect(stderr).toContain(`${place}: would make the directory ${join(disk.path, "not")}`);
    expect(existsSync(join(disk.path, "not"))).toBe(false);
    // What is known was there once.
    await expectRun(0, [source, place]);
    sh(`btrfs -q subvolume delete "$1"/not/there/home/2* >/dev/null; rm -r "$1/not"`, disk.path);
    expect((await expectRun(1, ["-S", source, place])).stderr).toContain("no such directory");
    expect(existsSync(join(disk.path, "not"))).toBe(false);
  });
});

describe("a known disk that is away", () => {
  test("is no error for -S --locked-dests as long as it lacks nothing", async () => {
    const { source, destination, b } = pair();
    const disk = filesystem();
    await expectRun(0, [source, destination, join(disk.path, "backup")]);
    unmount(disk);
    const quiet = await expectRun(0, ["-q", "-S", "--locked-dests", source]);
    expect([quiet.stderr, quiet.stdout]).toEqual(["", ""]);
    await nextSecond();
    await expectRun(0, [source, destination]);
    expect((await expectRun(1, ["-q", "-S", "--locked-dests", source])).stderr).toContain(
      disk.path,
    );
    // Whoever names it wants it.
    await expectRun(1, ["-S", source, join(disk.path, "backup")]);
    expect(existsSync(b.path)).toBe(true);
  });
});

describe("going back to 0.3.1 for a while", () => {
  test("what it did and began meanwhile is read from its own record, as long as that is newer", async () => {
    const { source, snapshots, destination } = pair();
    writeFileSync(join(source, "file"), "1");
    snapshotAs(source, "20260101-000000");
    await expectRun(0, ["-S", source, destination]);
    // What 0.3.1 does: it sends the second, and is interrupted in the third, which it has announced.
    for (const n of [2, 3]) {
      writeFileSync(join(source, "file"), `${n}`);
      snapshotAs(source, `2026010${n}-000000`);
    }
    sh(
      `btrfs send -q -p "$1/20260101-000000" "$1/20260102-000000" | btrfs receive -q "$2"; btrfs -q subvolume create "$2/20260103-000000" >/dev/null; echo half >"$2/20260103-000000/file"`,
      snapshots,
      destination,
    );
    const old = join(snapshots, ".outstanding_transfers");
    writeFileSync(
      old,
      JSON.stringify({
        "20260102-000000": { parent_locks: [destination] },
        "20260103-000000": { locks: [destination] },
      }),
    );
    const record = join(snapshots, ".btrfs-backup.json");
    utimesSync(record, 1, 1);
    const result = await expectRun(0, ["--json", "-S", source, destination]);
    expect(transfers(result).map(({ name, parent }) => [name, parent])).toEqual([
      ["20260103-000000", "20260102-000000"],
    ]);
    expectSound(destination, snapshots);
    expect(readFileSync(join(destination, "20260103-000000/file"), "utf8")).toBe("3");
    // What it remembers from before moves no pin back.
    writeFileSync(old, JSON.stringify({ "20260101-000000": { parent_locks: [destination] } }));
    utimesSync(record, 1, 1);
    const away = join(destination, "../away");
    renameSync(destination, away);
    await expectRun(1, ["-S", "-N", "1", source, destination]);
    expect(snapshotNames(snapshots)).toContain("20260103-000000");
    renameSync(away, destination);
    // From then on, ours is the newer one.
    rmSync(old);
    writeFileSync(old, JSON.stringify({ "20260101-000000": { parent_locks: ["/nowhere/else"] } }));
    utimesSync(old, 1, 1);
    const [{ locations }] = events(await run(["list", "--json", source])).filter(
      ({ event }) => event === "list",
    ) as [any];
    expect(JSON.stringify(locations)).not.toContain("/nowhere/else");
  });
});
