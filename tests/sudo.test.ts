// Running without root: with sudo for btrfs alone, or without any. And what others may see, or put in our way.

import { expect, test } from "bun:test";
import { existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  events,
  expectRun,
  expectSound,
  filesystem,
  fill,
  nextSecond,
  pair,
  ROOT,
  sh,
  snapshotAs,
  snapshotNames,
  sshServer,
  subvolume,
  subvolumes,
  temporaryDirectory,
  logged,
} from "./support/rig.ts";

const MANUAL = readFileSync(join(ROOT, "scripts/manual/without-root.md"), "utf8");
const SUDOERS = /^saver ALL=.*$/m.exec(MANUAL)?.[0] as string;
const as = (uid: number) => [
  "setpriv",
  "--reuid",
  String(uid),
  "--regid",
  String(uid),
  "--clear-groups",
  "env",
  "HOME=/tmp",
];
/** The checkout can be where an ordinary user may not look. */
function program(): string[] {
  const directory = temporaryDirectory();
  sh(`cp "$1" "$2/btrfs-backup"`, join(ROOT, "dist/btrfs-backup"), directory);
  return [join(directory, "btrfs-backup")];
}

test("an ordinary user with the manual's sudoers line backs up, here and over ssh", async () => {
  const { source, snapshots, destination, a, b } = pair();
  const { options, url, user } = await sshServer();
  user("saver", "/bin/bash", 4711);
  const directory = temporaryDirectory();
  // Private copies over the real ones, as for the user database.
  sh(
    `echo "$2" >"$1/sudoers"; chmod 440 "$1/sudoers"; mount --bind "$1/sudoers" /etc/sudoers; chmod 755 "$1"`,
    directory,
    SUDOERS,
  );
  sh(
    `mkdir "$1" "$2" "$3"; chown 4711 "$1" "$2" "$3"; cp "$4" "$4.backup"; chown 4711 "$4.backup"; chmod 600 "$4.backup"; chmod 755 "$(dirname "$4")"; chmod 644 "$(dirname "$4")/known"`,
    snapshots,
    destination,
    join(b.path, "pushed"),
    options[1]?.slice("IdentityFile=".length) ?? "",
  );
  const own = options.map((option) =>
    option.startsWith("IdentityFile=") ? `${option}.backup` : option,
  );
  const how = program();
  const wrapper = as(4711);
  writeFileSync(join(source, "secret"), "root's", { mode: 0o600 });
  for (let i = 0; i < 3; i++) {
    const result = await expectRun(
      0,
      [
        "--json",
        "--sudo",
        "--ssh-sudo",
        "-N",
        "2",
        "-n",
        "2",
        ...own,
        source,
        destination,
        url(join(b.path, "pushed"), "saver"),
      ],
      { how, wrapper, cwd: "/" },
    );
    if (i > 0)
      expect(
        events(result)
          .filter(({ event }) => event === "transfer")
          .every(({ parent }) => parent !== null),
      ).toBe(true);
    await nextSecond();
  }
  for (const folder of [destination, join(b.path, "pushed")]) {
    expectSound(folder, snapshots);
    expect(snapshotNames(folder).length).toBe(2);
  }
  const pushed = url(join(b.path, "pushed"), "saver");
  const listed = await expectRun(
    0,
    ["list", "--json", "--sudo", "--ssh-sudo", ...own, source, destination, pushed],
    { how, wrapper, cwd: "/" },
  );
  expect(
    events(listed)[0]?.["snapshots"].map(({ at }: { at: { state: string }[] }) =>
      at.map(({ state }) => state),
    ),
  ).toEqual([
    ["whole", "whole", "whole"],
    ["whole", "whole", "whole"],
  ]);
  writeFileSync(join(source, "new"), "new");
  const two = snapshotNames(destination);
  for (const [added, ...args] of [
    [1, source],
    [0, destination, ...two],
    [0, pushed, ...two],
  ] as [number, ...string[]][]) {
    const words = ["diff", "--json", "--sudo", "--ssh-sudo", ...own, ...args];
    const result = await expectRun(0, words, { how, wrapper, cwd: "/" });
    expect(events(result).at(-1)).toMatchObject({ added, removed: 0, renamed: 0 });
  }
  expect(readdirSync(snapshots).filter((name) => name.includes("diff"))).toEqual([]);
  for (const place of [destination, pushed])
    await expectRun(0, ["prune", "--sudo", "--ssh-sudo", ...own, "-n", "1", place], {
      how,
      wrapper,
      cwd: "/",
    });
  for (const folder of [destination, join(b.path, "pushed")])
    expect(snapshotNames(folder).length).toBe(1);
  const refused = await expectRun(1, ["-S", source, destination], { how, wrapper, cwd: "/" });
  expect(refused.stderr).toContain(
    `needs root: use --sudo, or be root (see "btrfs-backup help without-root")`,
  );
  // What --sudo is not enough for says so, before anything is made.
  const restoring = await expectRun(1, ["restore", "--sudo", destination, join(a.path, "back")], {
    how,
    wrapper,
    cwd: "/",
  });
  expect(restoring.stderr).toContain("--sudo is not enough");
  expect(existsSync(join(a.path, "back"))).toBe(false);
  expect(
    (await expectRun(1, ["verify", "--sudo", source, destination], { how, wrapper, cwd: "/" }))
      .stderr,
  ).toContain("help without-root");
  sh(`: >"$1/sudoers"`, directory);
  const nothing = await expectRun(1, ["-S", "--sudo", source], { how, wrapper, cwd: "/" });
  expect(logged(nothing.stderr).match(/sudo: .*required/g)?.length).toBe(1);
  sh(`umount /etc/sudoers`);
});

test("an ordinary user without sudo takes snapshots, and deletes what the policy drops, by name; transfers say what they need", async () => {
  const disk = filesystem();
  const directory = join(disk.path, "ann");
  sh(`mkdir "$1"; chown 4713 "$1"`, directory);
  const how = program();
  const options = { how, wrapper: as(4713), cwd: "/" };
  sh(
    `setpriv --reuid 4713 --regid 4713 --clear-groups sh -c 'btrfs -q subvolume create "$1/home"; echo 1 >"$1/home/file"' sh "$1"`,
    directory,
  );
  const source = join(directory, "home");
  const snapshots = join(source, "snapshot");
  for (let i = 0; i < 3; i++) {
    const [taken] = events(await expectRun(0, ["--json", source], options));
    expect(taken).toMatchObject({ event: "snapshot" });
    await nextSecond();
  }
  const names = snapshotNames(snapshots);
  expect([...subvolumes(snapshots).values()].map(({ readonly }) => readonly)).toEqual([
    true,
    true,
    true,
  ]);
  // What it cannot do.
  const other = join(filesystem().path, "x");
  const refused = await expectRun(
    1,
    ["-S", source, other, `raw://${other}`, "shell://cat >/dev/null"],
    options,
  );
  for (const id of [other, `raw://${other}`, "shell://cat >/dev/null"])
    expect(
      refused.stderr
        .split("\n")
        .filter(
          (line) =>
            line.startsWith(`[error] ${id}: `) &&
            line.includes(
              'sending needs root: use --sudo, or be root (see "btrfs-backup help without-root")',
            ),
        ).length,
    ).toBe(1);
  expect(existsSync(other)).toBe(false);
  expect(
    (await expectRun(1, ["restore", source, join(directory, "back")], options)).stderr,
  ).toContain("needs root");
  expect((await expectRun(0, ["list", source], options)).stdout).toContain(names[0] as string);
  // What is in a folder that it may not read is unknown, not nothing.
  sh(`chmod 311 "$1"`, snapshots);
  expect((await expectRun(1, [source], options)).stderr).toContain(
    `${snapshots}: Permission denied`,
  );
  sh(`chmod 700 "$1"`, snapshots);
  // Deleting needs the mount option, and -w, which touches only what goes.
  expect((await expectRun(1, ["-S", "-N", "2", source], options)).stderr).toMatch(
    /Operation not permitted|Read-only file system/,
  );
  expect(snapshotNames(snapshots)).toEqual(names);
  sh(`mount -o remount,user_subvol_rm_allowed "$1"`, disk.path);
  expect((await expectRun(1, ["-S", "-N", "2", source], options)).stderr).toContain(
    "Read-only file system",
  );
  sh(
    `mkdir "$1/20200101-000000"; btrfs -q subvolume create "$1/20200102-000000"; btrfs -q subvolume create "$1/mine"`,
    snapshots,
  );
  await expectRun(0, ["-S", "-w", "-N", "2", source], options);
  expect(snapshotNames(snapshots)).toEqual(["20200102-000000", ...names.slice(1)]);
  expect([...subvolumes(snapshots)].map(([name, { readonly }]) => [name, readonly])).toEqual([
    ["20200102-000000", false],
    [names[1] as string, true],
    [names[2] as string, true],
    ["mine", false],
  ]);
  // The snapshot that root's transfer builds on stays, and what root keeps, as root's record says.
  await expectRun(0, ["-S", source, join(filesystem().path, "backup")]);
  await expectRun(0, ["keep", source, names[1] as string]);
  sh(`chown 4713 "$1"/.btrfs-backup*`, snapshots);
  expect((await expectRun(1, ["release", source, names[1] as string], options)).stderr).toContain(
    "releasing needs root",
  );
  for (let i = 0; i < 2; i++) {
    await expectRun(0, ["-w", "-N", "1", source], options);
    await nextSecond();
  }
  expect(snapshotNames(snapshots).slice(1, -1)).toEqual(names.slice(1));
  await expectRun(0, ["release", source, names[1] as string]);
});

test("what the program writes is for its user alone, and its control sockets are in a private directory", async () => {
  const { source, snapshots, destination, b } = pair();
  const { options, url } = await sshServer();
  const stored = join(b.path, "stored");
  const watch = temporaryDirectory();
  writeFileSync(
    join(watch, "ssh"),
    `#!/bin/bash\np=$(grep -o 'ControlPath=[^ ]*' <<<"$*"); stat -c %a "$(dirname "\${p#*=}")" >>"${watch}/modes"\nexec ${sh("command -v ssh")} "$@"\n`,
    { mode: 0o755 },
  );
  await expectRun(
    0,
    [
      ...options,
      "--compress",
      "zstd",
      source,
      url(destination),
      `raw+${url(stored)}`,
      `shell://cat >/dev/null`,
    ],
    {
      env: { PATH: `${watch}:${process.env["PATH"]}` },
      wrapper: ["sh", "-c", 'umask 000; exec "$@"', "sh"],
    },
  );
  const files = sh(
    `find "$1"/.btrfs-backup* "$2"/.btrfs-backup* "$3" -type f -printf '%m %f\n'`,
    snapshots,
    destination,
    stored,
  ).split("\n");
  expect(files.length).toBeGreaterThan(7);
  expect(files.filter((line) => !line.startsWith("600 "))).toEqual([]);
  expect(sh(`stat -c %a "$@"`, snapshots, destination, stored)).toBe("700\n700\n700");
  expect(new Set(readFileSync(join(watch, "modes"), "utf8").trim().split("\n"))).toEqual(
    new Set(["700"]),
  );
});

test("a symbolic link that stands where a snapshot was is not followed when it is to be deleted", async () => {
  const { source, snapshots, a } = pair();
  const victim = subvolume(join(a.path, "victim"));
  fill(victim);
  for (const day of ["01", "02", "03"]) snapshotAs(source, `202601${day}-000000`);
  await expectRun(0, ["-S", source]);
  // Somebody swaps it between the listing and the deletion.
  const tools = temporaryDirectory();
  const real = sh("command -v btrfs");
  writeFileSync(
    join(tools, "btrfs"),
    `#!/bin/bash\n[ "$1 $2 $3" != "subvolume list -a" ] || [ "$4" != -r ] || { ${real} "$@"; s=$?; cd "${snapshots}"; [ -L 20260101-000000 ] || { mv 20260101-000000 hidden; ln -s "${victim}" 20260101-000000; }; exit $s; }\nexec ${real} "$@"\n`,
    { mode: 0o755 },
  );
  const result = await expectRun(1, ["-S", "-N", "1", source], {
    env: { PATH: `${tools}:${process.env["PATH"]}` },
  });
  expect(result.stderr).toContain("a symbolic link has the name of a subvolume");
  expect(subvolumes(a.path).has("victim")).toBe(true);
  expect(existsSync(join(victim, "plain"))).toBe(true);
  expect(snapshotNames(snapshots)).toEqual(["20260102-000000", "20260103-000000"]);
});

test("nothing secret is in a process list or a log: a passphrase goes by files and the environment only", async () => {
  const { source, b } = pair();
  // More than pipes and a relay hold, so that it is still being sent when the command looks.
  sh(`head -c 8M /dev/urandom >"$1/large"`, source);
  const seen = join(temporaryDirectory(), "seen");
  const secret = "correct horse battery staple";
  const command = `shell://head -c 1 >/dev/null; ps -eo args >>${seen}; gpg --batch --quiet --pinentry-mode loopback --passphrase-file <(printf %s "$SECRET") --symmetric --output "${join(b.path, "out")}"`;
  const result = await expectRun(0, ["-v", "debug", source, command], { env: { SECRET: secret } });
  expect(readFileSync(seen, "utf8")).toContain("btrfs send");
  expect(readFileSync(seen, "utf8") + result.stdout + result.stderr).not.toContain(secret);
});
