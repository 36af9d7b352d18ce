// Other btrfs-progs, other languages, other tools, and clocks that jump.

import { expect, test } from "bun:test";
import { mkdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  change,
  contentsDigest,
  events,
  expectRun,
  expectSound,
  filesystem,
  fill,
  nextSecond,
  pair,
  ROOT,
  run,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  subvolume,
  subvolumes,
  temporaryDirectory,
} from "./support/rig.ts";
import { generator, seeded, soak } from "./support/random.ts";

/** A directory with the newest btrfs-progs, which bring their own libraries. */
function newestBtrfs(): string {
  const tools = temporaryDirectory();
  const root = join(ROOT, "node_modules/.newest-btrfs-progs/usr");
  sh(`cp -r "$1/bin" "$1/lib" "$2/"`, root, tools); // the checkout can be where an ordinary user may not look
  const loader = sh(`find "$1/lib" -name 'ld-linux*' | head -1`, tools);
  mkdirSync(join(tools, "path"));
  writeFileSync(
    join(tools, "path/btrfs"),
    `#!/bin/sh\nexec ${loader} --library-path ${join(loader, "..")} ${tools}/bin/btrfs "$@"\n`,
    { mode: 0o755 },
  );
  return join(tools, "path");
}
/** A login shell with other tools or settings. */
function loginShell(settings: string, shell = "/bin/dash"): string {
  const file = join(temporaryDirectory(), "shell");
  writeFileSync(file, `#!/bin/bash\nexport ${settings}\nexec ${shell} "$@"\n`, { mode: 0o755 });
  return file;
}
const versionOf = (btrfs: string) => sh(`"$1" --version | head -1`, btrfs);

test("the installed btrfs-progs and the newest of Debian, on either side: all that is done with them", async () => {
  const newest = newestBtrfs();
  const versions = [versionOf("btrfs"), versionOf(join(newest, "btrfs"))];
  console.log(versions.join(", "));
  expect(versions[0]).not.toBe(versions[1]);
  const { options, url, user, guarded } = await sshServer();
  user("newest", loginShell(`PATH=${newest}:$PATH`));
  const path = { PATH: `${newest}:${process.env["PATH"]}` };
  for (const [env, login] of [
    [{}, "newest"],
    [path, undefined],
    [path, "newest"],
  ] as const) {
    const { source, snapshots, destination, a, b } = pair();
    const random = generator(21);
    const there = (place: string) => url(place, login);
    const stored = join(b.path, "stored");
    const key = guarded("--path", b.path);
    for (let i = 0; i < 3; i++) {
      change(source, random);
      const result = await expectRun(
        0,
        [
          ...(i === 1 ? key : options),
          "--json",
          "-N",
          "2",
          ...(i === 1 ? ["--resume"] : ["-n", "2"]),
          source,
          there(destination),
          `raw+${there(stored)}`,
        ],
        { env },
      );
      for (const { parent } of events(result).filter(({ event }) => event === "transfer"))
        expect(parent === null).toBe(i === 0);
      await nextSecond();
    }
    expectSound(destination, snapshots);
    expect([snapshotNames(snapshots).length, snapshotNames(destination).length]).toEqual([2, 2]);
    const pulled = join(b.path, "pulled");
    await expectRun(0, [...options, "-S", there(source), pulled], { env });
    expectSound(pulled, snapshots);
    expect(
      (await expectRun(0, ["list", "--size", ...options, source, there(destination)], { env }))
        .stdout,
    ).toMatch(/whole \d.*whole.*pin/);
    await expectRun(0, ["verify", ...options, source, there(destination)], { env });
    await expectRun(0, ["prune", "-n", "1", ...options, there(destination)], { env });
    expect(snapshotNames(destination).length).toBe(1);
    await expectRun(0, ["restore", ...options, there(destination), join(a.path, "back")], { env });
    await expectRun(
      0,
      ["restore", ...options, `raw+${there(stored)}`, there(join(a.path, "again"))],
      { env },
    );
    await expectRun(0, ["restore", ...options, "--replace", there(source), there(source)], { env });
    for (const name of ["back", "again"])
      expect(contentsDigest(join(a.path, name))).toBe(contentsDigest(source));
    await expectRun(0, ["copy", ...options, there(destination), join(filesystem().path, "copy")], {
      env,
    });
  }
}, 600_000);

test("as an ordinary user with the newest btrfs-progs", async () => {
  const disk = filesystem({ mount: "noatime,user_subvol_rm_allowed" });
  const tools = newestBtrfs();
  sh(
    `cp "$1" "$2/btrfs-backup"; mkdir "$3/ann"; chown 4714 "$3/ann"; setpriv --reuid 4714 --regid 4714 --clear-groups btrfs -q subvolume create "$3/ann/home"`,
    join(ROOT, "dist/btrfs-backup"),
    tools,
    disk.path,
  );
  const options = {
    how: [join(tools, "btrfs-backup")],
    wrapper: ["setpriv", "--reuid", "4714", "--regid", "4714", "--clear-groups"],
    cwd: "/",
    env: { HOME: "/tmp", PATH: `${tools}:${process.env["PATH"]}` },
  };
  const source = join(disk.path, "ann/home");
  for (let i = 0; i < 3; i++) {
    await expectRun(0, ["-w", "-N", "2", source], options);
    await nextSecond();
  }
  expect(snapshotNames(join(source, "snapshot")).length).toBe(2);
});

test("with German on both sides, errors are told from each other, and files are found, as ever", async () => {
  const locales = temporaryDirectory();
  sh(`localedef -i de_DE -f UTF-8 "$1/de_DE.UTF-8"`, locales);
  const german = { LOCPATH: locales, LANG: "de_DE.UTF-8", LC_ALL: "de_DE.UTF-8", LANGUAGE: "de" };
  expect(sh(`LOCPATH="$1" LC_ALL=de_DE.UTF-8 date -d 2026-03-01 +%B`, locales)).toBe("März");
  const { source, snapshots, destination, b } = pair();
  const { options, url, user } = await sshServer();
  user(
    "german",
    loginShell(
      Object.entries(german)
        .map(([name, value]) => `${name}=${value}`)
        .join(" "),
    ),
  );
  const env = { env: german };
  const place = url(destination, "german");
  for (let i = 0; i < 2; i++) {
    await expectRun(0, [...options, source, place, `raw://${join(b.path, "raw")}`], env);
    await nextSecond();
    sh(`echo "$2" >"$1/file"`, source, String(i));
  }
  expectSound(destination, snapshots);
  await expectRun(0, ["list", "--size", ...options, source, place], env);
  await expectRun(0, ["verify", ...options, source, place], env);
  expect(
    events(
      await expectRun(0, ["versions", "--json", ...options, join(source, "file"), place], env),
    ).filter(({ event }) => event === "version").length,
  ).toBe(1);
  await expectRun(0, ["prune", "-n", "1", ...options, place], env);
  await expectRun(
    0,
    [...options, "-S", source, "--optional", url("/nowhere/at/all", "german")],
    env,
  );
  const small = filesystem({ size: "150M" });
  sh(`head -c 200M /dev/urandom >"$1/large"`, source);
  expect(
    (
      await expectRun(
        1,
        [
          ...options,
          "--skip-space-check",
          "--make-room",
          "-n",
          "1",
          source,
          url(join(small.path, "x"), "german"),
        ],
        env,
      )
    ).stderr,
  ).toContain("No space left on device");
});

test("a remote host whose tools are busybox's, but for flock: backups, stores, lists and restores", async () => {
  const tools = temporaryDirectory();
  sh(
    `for applet in $(busybox --list); do ln -s "$(command -v busybox)" "$1/$applet"; done; for real in btrfs flock zstd; do ln -sf "$(command -v $real)" "$1/$real"; done; rm -f "$1/sh"; ln -s "$(command -v busybox)" "$1/sh"`,
    tools,
  );
  const { options, url, user } = await sshServer();
  user("busybox", loginShell(`PATH=${tools}`, join(tools, "sh")));
  const { source, snapshots, destination, a, b } = pair();
  const stored = join(b.path, "stored");
  const there = (place: string) => url(place, "busybox");
  for (let i = 0; i < 3; i++) {
    sh(`echo "$2" >"$1/file"`, source, String(i));
    await expectRun(0, [
      ...options,
      "-n",
      "2",
      "--full-every",
      "1",
      ...(i === 1 ? ["--resume"] : []),
      "--compress",
      "zstd",
      source,
      there(destination),
      `raw+${there(stored)}`,
    ]);
    await nextSecond();
  }
  expectSound(destination, snapshots);
  expect(snapshotNames(destination).length).toBe(2);
  expect(
    (await expectRun(0, ["list", ...options, source, there(destination), `raw+${there(stored)}`]))
      .stdout,
  ).toContain("whole, pin");
  await expectRun(0, ["verify", ...options, `raw+${there(stored)}`]);
  await expectRun(0, ["restore", ...options, there(destination), join(a.path, "back")]);
  await expectRun(0, ["restore", ...options, `raw+${there(stored)}`, join(a.path, "again")]);
  for (const name of ["back", "again"])
    expect(contentsDigest(join(a.path, name))).toBe(contentsDigest(source));
  await expectRun(0, [...options, "-S", there(source), join(b.path, "pulled")]);
  expectSound(join(b.path, "pulled"), snapshots);
  // What it lacks is named.
  expect((await expectRun(1, ["verify", ...options, source, there(destination)])).stderr).toContain(
    "GNU tar not found",
  );
});

test("a clock that jumps back a year, or forward ten: nothing is lost to retention, and the order is that of IDs", async () => {
  const disk = filesystem();
  const source = subvolume(join(disk.path, "home"));
  fill(source);
  const snapshots = join(source, "snapshot");
  const destination = join(filesystem().path, "backup");
  const day = (days: number) =>
    new Date(Date.now() + days * 86400e3).toISOString().slice(0, 10).replaceAll("-", "");
  const take = (name: string) => (
    sh(`echo "$2" >>"$1/log"`, source, name),
    snapshotAs(source, name),
    name
  );
  // A week as it should be; then the clock stood ten years ahead; then a year behind.
  const week = [-9, -8, -7, -6, -5, -4, -3].map((days) => take(`${day(days)}-030000`));
  await expectRun(0, ["-S", source, destination]);
  const ahead = [3650, 3651].map((days) => take(`${day(days)}-030000`));
  const warned = await expectRun(0, [
    "-S",
    "-N",
    "30d 14d+",
    "-n",
    "30d 14d+",
    source,
    destination,
  ]);
  expect(warned.stderr).toContain("2 snapshots of");
  expect(warned.stderr).toContain("dated in the future");
  for (const place of [snapshots, destination])
    expect(snapshotNames(place)).toEqual([...week, ...ahead]);
  const behind = [-370, -369].map((days) => take(`${day(days)}-030000`));
  const result = await expectRun(0, [
    "-S",
    "--json",
    "-N",
    "30d 14d+",
    "-n",
    "30d 14d+",
    source,
    destination,
  ]);
  expect(
    events(result)
      .filter(({ event }) => event === "transfer")
      .map(({ name, parent }) => [name, parent]),
  ).toEqual([
    [behind[0], ahead[1]],
    [behind[1], behind[0]],
  ]);
  for (const place of [snapshots, destination])
    expect(snapshotNames(place).sort()).toEqual([...behind, ...week, ...ahead].sort());
  // And the clock is right again: the newest three are those that were taken last.
  const now = events(await expectRun(0, ["--json", source, destination])).find(
    ({ event }) => event === "snapshot",
  )?.["name"] as string;
  await expectRun(0, ["-S", "-N", "3", "-n", "3", source, destination]);
  for (const place of [snapshots, destination])
    expect(snapshotNames(place).sort()).toEqual([...behind, now].sort());
  expectSound(destination, snapshots);
});

test("random clocks: the newest by ID and the pin always stay, and every transfer builds on the one before", async () => {
  const random = seeded();
  const { source, snapshots, destination } = pair();
  let last: string | null = null;
  for (let i = 0; i < soak(8); i++) {
    const days = Math.floor((random() - 0.5) * 4000);
    const name = `${new Date(Date.now() + days * 86400e3).toISOString().slice(0, 10).replaceAll("-", "")}-${String(100000 + i).slice(0, 6)}`;
    sh(`echo "$2" >>"$1/log"`, source, name);
    snapshotAs(source, name);
    const policy = ["1", "3d 2w", "2d+", "1 1m"][Math.floor(random() * 4)] as string;
    const sent = events(
      await expectRun(0, ["-S", "--json", "-N", policy, "-n", policy, source, destination]),
    ).filter(({ event }) => event === "transfer");
    expect(sent.map(({ name, parent }) => [name, parent])).toEqual([[name, last]]);
    const standing = [...subvolumes(snapshots)].sort(([, a], [, b]) => a.id - b.id);
    expect(standing.at(-1)?.[0]).toBe(name);
    expect(snapshotNames(destination)).toContain(name);
    last = name;
  }
  expectSound(destination, snapshots);
});

test("two hosts that back up into one folder at a time, in loops: each with its own prefix, or one is refused", async () => {
  const [a, b] = [filesystem(), filesystem()];
  const destination = join(filesystem().path, "backup");
  const sources = [a, b].map(({ path }) => subvolume(join(path, "home")));
  for (const source of sources) fill(source);
  const host = (i: number) => ({
    wrapper: [
      "unshare",
      "--uts",
      "sh",
      "-c",
      `echo host-${i} >/proc/sys/kernel/hostname; exec "$@"`,
      "sh",
    ],
  });
  for (let round = 0; round < soak(4); round++) {
    for (const [i, source] of sources.entries()) sh(`echo "$2" >>"$1/file"`, source, String(i));
    await Promise.all(
      sources.map((source, i) =>
        expectRun(
          0,
          ["-q", "-p", `host-${i}-`, "-N", "2", "-n", "2", source, destination],
          host(i),
        ),
      ),
    );
    // Without a prefix there can be only one, whoever was first.
    const both = await Promise.all(
      sources.map((source, i) =>
        run(
          ["-q", "-p", "both-", "--wait", "60", "-N", "2", "-n", "2", source, destination],
          host(i),
        ),
      ),
    );
    expect(both.map(({ status }) => status).sort()).toEqual([0, 1]);
    expect(both.find(({ status }) => status === 1)?.stderr).toContain(
      "the backups there belong to host-",
    );
    await nextSecond();
  }
  const kept = Math.min(2, soak(4));
  for (const [i, source] of sources.entries()) {
    expect(snapshotNames(destination, `host-${i}-`).length).toBe(kept);
    expectSound(destination, join(source, "snapshot"), `host-${i}-`);
  }
  expect(snapshotNames(destination, "both-").length).toBe(kept);
}, 300_000);
