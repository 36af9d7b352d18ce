// check: what the next run would refuse, and what needs care, without a change anywhere.

import { beforeAll, describe, expect, test } from "bun:test";
import { appendFileSync, chmodSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  events,
  expectRun,
  filesystem,
  holdLock,
  pair,
  pathWith,
  pathWithout,
  PROGRAM,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  subvolume,
  subvolumes,
  temporaryDirectory,
  unmount,
  type Options,
  type Result,
} from "./support/rig.ts";
import { day } from "./support/names.ts";

const CRON = "/etc/cron.d/btrfs-backup";

// The tests have a mount namespace of their own.
beforeAll(() => {
  sh(`mkdir -p /etc/cron.d; mount -t tmpfs tmpfs /etc/cron.d`);
  writeFileSync(CRON, "0 * * * * root btrfs-backup /home /backup\n");
});

const findings = (result: Result) =>
  events(result).filter(({ event }) => event === "finding") as Record<string, string>[];

/** What a check finds that is not ok, by what it is about. */
async function found(status: number, args: string[], options?: Options) {
  const result = await expectRun(status, ["check", "--json", ...args], options);
  expect(events(result).at(-1)).toMatchObject({ event: "summary", ok: status === 0 });
  return findings(result).filter(({ level }) => level !== "ok");
}

/** A pair with three days of snapshots, all backed up. */
async function backedUp() {
  const made = pair();
  for (const n of [1, 2, 3]) snapshotAs(made.source, day(n));
  await expectRun(0, ["-S", made.source, made.destination]);
  return made;
}

/** All that a check could have changed on two filesystems: names, inodes, times, contents, subvolumes. */
const stateOf = (...paths: string[]) =>
  paths.map((path) =>
    sh(
      `cd "$1"; btrfs filesystem sync .; find . -path '*/plain' -prune -o -inum 2 -prune -o -printf '%p %i %y %m %s %T@ %C@\\n' | sort; find . -name '.btrfs-backup*' -type f -exec sha256sum {} + | sort; btrfs subvolume list -u -R -c . | sort; btrfs subvolume show . | grep Generation`,
      path,
    ),
  );

describe("a healthy pair", () => {
  test("is all ok, a line each, and nothing on the disks has changed", async () => {
    const { source, destination, a, b } = await backedUp();
    const before = stateOf(a.path, b.path);
    const result = await expectRun(0, ["check", source, destination]);
    const lines = result.stdout.trim().split("\n");
    expect(lines.filter((line) => !line.startsWith("ok    "))).toEqual([]);
    const told = lines.map((line) => line.split(/ +/)[1]);
    const abouts =
      "source tools fence lock record nested duplicates snapshots edited leftovers timer space destination disk backups";
    for (const about of abouts.split(" ")) expect(told).toContain(about);
    expect(result.stdout).toContain(`the newest backup is ${day(3)}`);
    expect(result.stdout).toContain(CRON);
    expect(result.stdout).toMatch(/Linux \d.*, btrfs \d.*, flock \d/);
    expect(await found(0, [source, destination])).toEqual([]);
    expect((await expectRun(0, ["check", "--quiet", source, destination])).stdout).toBe("");
    expect(stateOf(a.path, b.path)).toEqual(before);
  });

  test("by a run's argument file, over ssh, and as streams and a command", async () => {
    const { source, destination, b } = await backedUp();
    const { options, url } = await sshServer();
    const directory = temporaryDirectory();
    const file = join(directory, "home.args");
    const places = [url(destination), `raw://${b.path}/raw`, `shell://cat > ${b.path}/stream`];
    const words = options.map((word) => (word === "--ssh-opt" ? word : ` ${word}`));
    const lines = words.join("\n").replaceAll("\n ", " ");
    writeFileSync(
      file,
      `--quiet\n--no-snapshot\n--num-snapshots 7d\n--num-backups 14d+ 8w\n--compress zstd\n${lines}\n${source}\n${places.join("\n")}\n`,
    );
    await expectRun(0, [`@${file}`]);
    const before = stateOf(b.path);
    const result = await expectRun(0, ["check", "--json", `@${file}`]);
    // The destination is known by its path as well.
    expect(findings(result).filter(({ level }) => level !== "ok")).toMatchObject([
      { level: "warn", about: "record", mend: `btrfs-backup unpin ${source} ${destination}` },
    ]);
    expect(findings(result)).toContainEqual(
      expect.objectContaining({
        about: "tools",
        place: places[0],
        message: expect.stringMatching(/^\S+ is reached: Linux .* zstd \d/),
      }),
    );
    expect(stateOf(b.path)).toEqual(before);
  });

  test("before the first run: nothing is made", async () => {
    const { source, destination, a, b } = pair();
    const before = stateOf(a.path, b.path);
    expect((await found(0, [source, destination])).map(({ about }) => about)).toEqual([
      "snapshots",
      "backups",
    ]);
    expect(stateOf(a.path, b.path)).toEqual(before);
  });
});

describe("fails, with a run's words and what mends it", () => {
  test("a source that is none, and a destination in its place, or on its filesystem", async () => {
    const { source, destination, a, b } = pair();
    expect(await found(1, [`${source}/plain`, destination])).toMatchObject([
      { level: "fail", about: "source", message: expect.stringContaining("not a subvolume") },
    ]);
    expect(await found(1, [b.path, join(b.path, "snapshot")])).toMatchObject([
      { level: "fail", message: expect.stringContaining("is the snapshot folder") },
    ]);
    expect(await found(1, [source, join(a.path, "backup")])).toContainEqual(
      expect.objectContaining({
        level: "fail",
        about: "destination",
        message: expect.stringContaining("it lies on the filesystem of"),
      }),
    );
  });

  test("a disk that is not mounted; an optional one is a warning", async () => {
    const { source, destination, b } = await backedUp();
    unmount(b);
    const run = await expectRun(1, ["--dry-run", source, destination]);
    const [only, ...more] = await found(1, [source, destination]);
    expect(more).toEqual([]);
    expect(only).toMatchObject({ level: "fail", about: "destination", place: destination });
    expect(only?.["message"]).toContain("is the disk mounted?");
    expect(run.stderr).toContain(only?.["message"] as string);
    expect(only?.["mend"]).not.toBeNull();
    expect(await found(0, [source, "--optional", destination])).toMatchObject([{ level: "warn" }]);
    const old = ["--max-age", "1h", source, "--optional", destination];
    expect(await found(1, old)).toContainEqual(expect.objectContaining({ about: "destination" }));
  });

  test("another source's folder", async () => {
    const { destination } = await backedUp();
    const other = subvolume(join(filesystem().path, "other"));
    expect(await found(1, [other, destination])).toContainEqual(
      expect.objectContaining({
        level: "fail",
        about: "destination",
        message: expect.stringContaining("belong"),
        mend: `btrfs-backup --adopt ${other} ${destination}`,
      }),
    );
  });

  test("a host that is not reached, and a key that nobody knows", async () => {
    const { source } = await backedUp();
    expect(await found(1, [source, "ssh://127.0.0.1:1/x"])).toContainEqual(
      expect.objectContaining({ level: "fail", mend: "ssh -p 1 127.0.0.1 true" }),
    );
    const { options, url } = await sshServer();
    const stranger = options.map((word) =>
      word.replace(/^IdentityFile=.*/, "IdentityFile=/dev/null"),
    );
    expect(await found(1, [...stranger, source, url("/x")])).toContainEqual(
      expect.objectContaining({
        level: "fail",
        about: "destination",
        message: expect.stringContaining("Permission denied"),
        mend: expect.stringMatching(/^ssh -p \d+ 127\.0\.0\.1 true$/),
      }),
    );
  });

  test("zstd that is missing, and a key of gpg", async () => {
    const { source, b } = await backedUp();
    const store = `raw://${b.path}/raw`;
    const env = { PATH: pathWithout("zstd") };
    expect(await found(1, ["--compress", "zstd", source, store], { env })).toContainEqual(
      expect.objectContaining({ level: "fail", about: "destination", mend: "apt install zstd" }),
    );
    expect(await found(1, ["--encrypt-to", "nobody", source, store])).toContainEqual(
      expect.objectContaining({ level: "fail", about: "destination" }),
    );
  });

  test("rclone that is missing; where it is there, its store is as good as any", async () => {
    const { source, b } = await backedUp();
    const store = `rclone://store:${b.path}/objects`;
    const remote = { RCLONE_CONFIG: "/dev/null", RCLONE_CONFIG_STORE_TYPE: "local" };
    await expectRun(0, ["-S", source, store], { env: remote });
    const told = findings(
      await expectRun(0, ["check", "--json", source, store], { env: remote }),
    ).filter(({ place }) => place === store);
    expect(told.map(({ level, about }) => [level, about])).toEqual(
      ["duplicates", "destination", "tools", "leftovers", "backups"].map((about) => ["ok", about]),
    );
    expect(told[2]?.["message"]).toMatch(/rclone \d/);
    const env = { ...remote, PATH: pathWithout("rclone") };
    expect(await found(1, [source, store], { env })).toContainEqual(
      expect.objectContaining({ level: "fail", mend: "apt install rclone" }),
    );
  });

  test("what needs root", async () => {
    const { source, destination } = await backedUp();
    const wrapper = ["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups"];
    expect(await found(1, [source, destination], { wrapper })).toContainEqual(
      expect.objectContaining({
        level: "fail",
        mend: `sudo btrfs-backup check ${source}`,
      }),
    );
  });

  test("a record that cannot be read, at both ends", async () => {
    const { source, snapshots, destination } = await backedUp();
    for (const folder of [snapshots, destination])
      appendFileSync(join(folder, ".btrfs-backup.json"), "x");
    const all = await found(1, [source, destination]);
    expect(all).toContainEqual(
      expect.objectContaining({
        level: "fail",
        about: "record",
        mend: `btrfs-backup unpin --all ${source}`,
      }),
    );
    expect(all).toContainEqual(
      expect.objectContaining({
        level: "fail",
        place: destination,
        message: expect.stringContaining("nothing is deleted there"),
      }),
    );
  });

  test("a name that is taken, and a newest backup that is too old", async () => {
    const { source, destination } = await backedUp();
    snapshotAs(source, day(4));
    mkdirSync(join(destination, day(4)));
    const all = await found(1, ["--max-age", "1d", source, destination]);
    expect(all).toContainEqual(
      expect.objectContaining({
        level: "fail",
        about: "backups",
        message: expect.stringContaining(`${day(4)} is not sent`),
        mend: `mv ${destination}/${day(4)} ${destination}/${day(4)}.other`,
      }),
    );
    expect(all.filter(({ message }) => message?.includes("(at most 1d)"))).toHaveLength(2);
  });

  test("a place that others can change, where no mount namespace can be had", async () => {
    const { source, destination, b } = await backedUp();
    chmodSync(b.path, 0o777);
    const tools = temporaryDirectory();
    // A mount(8) that accepts an option which it does not know.
    writeFileSync(
      join(tools, "mount"),
      `#!/bin/bash\nargs=(); for one; do args+=("\${one//,nosymfollow/}"); done; exec ${sh("command -v mount")} "\${args[@]}"\n`,
      { mode: 0o755 },
    );
    const all = await found(1, [source, destination], { env: pathWith(tools) });
    expect(all).toContainEqual(
      expect.objectContaining({
        level: "fail",
        about: "fence",
        mend: `chown root ${b.path} && chmod go-w ${b.path}`,
      }),
    );
  });

  test("a service that failed", async () => {
    const { source, destination } = await backedUp();
    const tools = temporaryDirectory();
    // There is no systemd here.
    writeFileSync(
      join(tools, "systemctl"),
      "#!/bin/sh\nprintf 'Id=btrfs-backup@home.timer\\nActiveState=inactive\\nLastTriggerUSec=n/a\\n\\nId=btrfs-backup@home.service\\nActiveState=failed\\nResult=exit-code\\n'\n",
      { mode: 0o755 },
    );
    expect(await found(1, [source, destination], { env: pathWith(tools) })).toMatchObject([
      { level: "fail", about: "timer", message: expect.stringContaining("@home.service failed") },
      { level: "warn", about: "timer", message: expect.stringContaining("is not active") },
    ]);
  });
});

describe("warns, and exits with 0", () => {
  test("of a run that is at work, without waiting for it", async () => {
    const { source, snapshots, destination } = await backedUp();
    const releases = [
      await holdLock(join(snapshots, ".btrfs-backup..lock")),
      await holdLock(join(destination, ".btrfs-backup..lock")),
    ];
    const all = await found(0, ["--wait", "1000", source, destination]);
    for (const place of [source, destination])
      expect(all).toContainEqual(
        expect.objectContaining({
          level: "warn",
          about: "lock",
          place,
          mend: expect.stringMatching(/^ps -o pid,etime,args -p [\d,]+$/),
        }),
      );
    for (const release of releases) await release();
    expect(await found(0, [source, destination])).toEqual([]);
    // A run in earnest, which has locked its source when it calls this.
    const told = join(temporaryDirectory(), "told");
    const hook = `${PROGRAM.binary.join(" ")} check --json ${source} ${destination} >${told}`;
    await expectRun(0, ["--before-snapshot", hook, source, destination]);
    const [, holder = ""] = /(?:process|processes) (\d+)/.exec(readFileSync(told, "utf8")) ?? [];
    expect(readFileSync(told, "utf8")).toContain("a run is at work there");
    expect(Number(holder)).toBeGreaterThan(1);
  });

  test("of a known destination that is not named, and of a record that others can write", async () => {
    const { source, snapshots, destination } = await backedUp();
    chmodSync(join(snapshots, ".btrfs-backup.json"), 0o666);
    const { options, url } = await sshServer();
    expect((await found(0, [...options, url(source), destination]))[0]).toMatchObject({
      about: "record",
      message: expect.stringContaining("is another host's"),
    });
    const all = await found(0, [source]);
    expect(all.map(({ about, level }) => [about, level])).toEqual([
      ["record", "warn"],
      ["record", "warn"],
    ]);
    expect(all[1]).toMatchObject({ mend: `btrfs-backup unpin ${source} ${destination}` });
  });

  test("of nested subvolumes, and of two with one received UUID", async () => {
    const { source, destination, b } = await backedUp();
    subvolume(join(source, "inner"));
    sh(`btrfs -q subvolume snapshot -r "$1/${day(3)}" "$2/twin" >/dev/null`, destination, b.path);
    const all = await found(0, [source, destination]);
    expect(all.map(({ about, place }) => [about, place])).toEqual([
      ["nested", source],
      ["duplicates", destination],
    ]);
  });

  test("of what a broken transfer left, and what was not sent", async () => {
    const { source, destination } = await backedUp();
    snapshotAs(source, day(4));
    const record = join(destination, ".btrfs-backup.json");
    subvolume(join(destination, day(4)));
    writeFileSync(
      record,
      readFileSync(record, "utf8").replace(`,"": {`, `,"": {"receiving":"${day(4)}","since":"x",`),
    );
    const all = await found(0, [source, destination]);
    expect(all).toMatchObject([
      { about: "leftovers", message: expect.stringContaining(day(4)) },
      { about: "backups", mend: `btrfs-backup -S ${source} ${destination}` },
    ]);
    expect([...subvolumes(destination).keys()]).toContain(day(4));
    // The command mends it.
    await expectRun(0, String(all[1]?.["mend"]).split(" ").slice(1));
    expect(await found(0, [source, destination])).toEqual([]);
  });

  test("of a part that is kept, of an interrupted restore, and of a snapshot from the future", async () => {
    const { source, destination } = await backedUp();
    writeFileSync(join(destination, ".x.p0-.part"), "");
    mkdirSync(`${source}.restoring-20260101-000000`);
    subvolume(`${source}.restoring-20260101-000000/tree`);
    snapshotAs(source, "20990101-000000");
    const all = await found(0, [source, destination]);
    expect(all.map(({ about, place }) => [about, place])).toEqual([
      ["snapshots", source],
      ["leftovers", source],
      ["leftovers", destination],
      ["backups", destination],
    ]);
    expect(all[0]?.["message"]).toContain("dated in the future");
  });

  test("of a snapshot that was edited", async () => {
    const { source, snapshots, destination } = await backedUp();
    sh(
      `cd "$1"; btrfs property set -ts . ro false; echo edited >plain/1; btrfs property set -ts . ro true; sync`,
      join(snapshots, day(3)),
    );
    const [first] = (await found(0, [source, destination])).filter(
      ({ about }) => about === "edited",
    );
    expect(first).toMatchObject({
      level: "warn",
      message: expect.stringContaining(`${day(3)} may have been edited`),
      mend: `btrfs-backup verify --snapshot ${day(3)} ${source} DEST`,
    });
  });

  test("of a disk that is full within two weeks, and of one that the source lies on", async () => {
    const directory = temporaryDirectory();
    const device = (...args: string[]) => sh(`losetup -f --show "$@"`, ...args);
    sh(`truncate -s 620M "$1/disk"`, directory);
    const disk = device(join(directory, "disk"));
    const parts = [device("--sizelimit", "300M", disk), device("-o", "300M", disk)];
    const [one = "", other = ""] = parts.map((part, i) => {
      const path = join(directory, String(i));
      sh(`mkdir "$1"; mkfs.btrfs -q "$2" >/dev/null`, path, part);
      return path;
    });
    try {
      sh(`mount "$1" "$2"; mount "$3" "$4"`, String(parts[0]), one, String(parts[1]), other);
      const source = subvolume(join(one, "home"));
      snapshotAs(source, day(1));
      sh(`head -c 50M /dev/urandom >"$1/large"; sync`, source);
      snapshotAs(source, day(2));
      const destination = join(other, "backup");
      await expectRun(0, ["-S", source, destination]);
      const all = await found(0, [source, destination]);
      expect(all.map(({ about, place }) => [about, place])).toEqual([
        ["space", source],
        ["space", destination],
        ["disk", destination],
      ]);
      expect(all[1]?.["mend"]).toBe(`btrfs-backup prune --dry-run -n POLICY ${destination}`);
    } finally {
      sh(`umount "$@"`, one, other);
      sh(`losetup -d "$@"`, ...parts, disk);
    }
  });

  test("of a stream that cannot be restored, since what it builds on was deleted", async () => {
    const { source, b } = pair();
    for (const n of [1, 2, 3]) snapshotAs(source, day(n));
    const folder = join(b.path, "raw");
    await expectRun(0, ["-S", source, `raw://${folder}`]);
    sh(`rm "$1/${day(2)}"*`, folder);
    const all = await found(0, [source, `raw://${folder}`]);
    expect(all).toContainEqual(
      expect.objectContaining({
        level: "warn",
        about: "destination",
        message: expect.stringContaining("1 stream cannot be restored"),
      }),
    );
  });

  test("that nothing starts a run", async () => {
    const { source, destination } = await backedUp();
    const text = readFileSync(CRON, "utf8");
    rmSync(CRON);
    try {
      expect(await found(0, [source, destination])).toMatchObject([
        { level: "warn", about: "timer" },
      ]);
    } finally {
      writeFileSync(CRON, text);
    }
  });

  test("of what a guarded key may not ask, and of nothing else", async () => {
    const { source, b } = pair();
    for (const n of [1, 2, 3]) snapshotAs(source, day(n));
    const folder = join(b.path, "backup");
    const { guarded, url } = await sshServer();
    const options = guarded("--path", b.path);
    await expectRun(0, ["-S", ...options, source, url(folder)]);
    const all = await found(0, [...options, source, url(folder)]);
    expect(all.map(({ about }) => about)).toEqual(["tools", "lock"]);
    for (const { level, message } of all) {
      expect(level).toBe("warn");
      expect(message).toContain("refused");
    }
    expect(snapshotNames(folder)).toEqual([1, 2, 3].map(day));
  });
});
