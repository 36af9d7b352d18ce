// Other hosts, and names that would be syntax if anybody let them: whatever the login shell.

import { expect, test } from "bun:test";
import { existsSync, readdirSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  change,
  events,
  expectRun,
  expectSound,
  filesystem,
  fill,
  loginShells,
  nextSecond,
  pair,
  pathWithout,
  sh,
  snapshotNames,
  sshServer,
  subvolume,
  subvolumes,
  temporaryDirectory,
} from "./support/rig.ts";
import { generator } from "./support/random.ts";

test("push, pull, and both ends remote go on from each other incrementally", async () => {
  const { source, snapshots, destination } = pair();
  const { options, url } = await sshServer();
  const random = generator(5);
  await expectRun(0, [...options, "-q", source, url(destination)]);
  for (const ends of [
    [url(source), destination],
    [url(source), url(destination)],
    [source, url(destination)],
    [source, destination],
  ] as const) {
    change(source, random);
    await nextSecond();
    const before = snapshotNames(snapshots).at(-1);
    const result = await expectRun(0, [...options, "--json", ...ends]);
    expect(events(result).find(({ event }) => event === "transfer")).toMatchObject({
      parent: before,
    });
  }
  expect(snapshotNames(destination).length).toBe(5);
  expectSound(destination, snapshots);
});

test("several destinations on one host, retention there, and a run without snapshots", async () => {
  const { source, snapshots, destination, b } = pair();
  const { options, url } = await sshServer();
  for (let i = 0; i < 3; i++) {
    await expectRun(0, [
      ...options,
      "-q",
      "-N",
      "2",
      "-n",
      "2",
      url(source),
      url(destination),
      url(join(b.path, "second")),
    ]);
    await nextSecond();
  }
  for (const folder of [snapshots, destination, join(b.path, "second")])
    expect(snapshotNames(folder).length).toBe(2);
  await expectRun(0, [...options, "-q", "-S", "--wait", "1", url(source), url(destination)]);
});

test("a host that is not there, one that refuses us, and a transfer that ssh drops", async () => {
  const { source, snapshots, destination } = pair();
  const { options, url } = await sshServer();
  const away = "ssh://127.0.0.1:1/backup";
  expect((await expectRun(1, [...options, source, away, destination])).stderr).toMatch(
    /127\.0\.0\.1.*refused/i,
  );
  expect(snapshotNames(destination).length).toBe(1);
  await expectRun(0, [...options, "-S", source, "--optional", away]);
  expect(
    (
      await expectRun(1, [
        "--ssh-opt",
        "IdentityFile=/dev/null",
        "--ssh-opt",
        "BatchMode=yes",
        "--ssh-opt",
        "StrictHostKeyChecking=no",
        "--ssh-opt",
        "UserKnownHostsFile=/dev/null",
        "-S",
        source,
        "--optional",
        url(destination),
      ])
    ).stderr,
  ).toContain("Permission denied");
  sh(`head -c 100M /dev/urandom >"$1/large"`, source);
  await nextSecond();
  const slow = temporaryDirectory();
  writeFileSync(
    join(slow, "ssh"),
    `#!/bin/bash\ncase "$*" in *btrfs-backup:receive*) ${sh("command -v ssh")} "$@" & sleep 0.4; kill -9 $!; wait $!;; *) exec ${sh("command -v ssh")} "$@";; esac\n`,
    { mode: 0o755 },
  );
  const dropped = await expectRun(1, [...options, source, url(destination)], {
    env: { PATH: `${slow}:${process.env["PATH"]}` },
  });
  expect(dropped.stderr).toContain("btrfs receive on 127.0.0.1");
  await expectRun(0, [...options, "-S", "--wait", "30", source, url(destination)]);
  expectSound(destination, snapshots);
});

test("a host without btrfs-progs or flock of util-linux is refused by the package's name", async () => {
  const { source, b } = pair();
  const { options, url, user } = await sshServer();
  for (const [name, missing, message] of [
    ["nobtrfs", "btrfs", "btrfs-progs"],
    ["noflock", "flock", "util-linux"],
  ] as const) {
    const tools = pathWithout(missing);
    if (missing === "flock") sh(`ln -s "$(command -v busybox)" "$1/flock"`, tools);
    // A login shell that sees only these; the directories that verbs add hold nothing else.
    const shell = join(temporaryDirectory(), "shell");
    writeFileSync(
      shell,
      `#!/bin/bash\nexec unshare --mount bash -c 'mkdir -p /tmp/empty; for d in /usr/sbin /sbin; do mount --bind /tmp/empty $d; done; PATH=${tools}; exec dash "$@"' x "$@"\n`,
      { mode: 0o755 },
    );
    user(name, shell);
    const result = await expectRun(1, [...options, source, url(join(b.path, "x"), name)]);
    expect(result.stderr).toContain(message);
    expect(existsSync(join(b.path, "x"))).toBe(false);
  }
});

test("--compress sends less between hosts, whichever side is remote, for run, copy and restore; --rate-limit slows down", async () => {
  const { source, snapshots, destination } = pair();
  const { options, url } = await sshServer();
  sh(`head -c 20M /dev/zero | tr "\\\\0" x >"$1/text"`, source);
  const sent = (result: Awaited<ReturnType<typeof expectRun>>) =>
    events(result).find(({ event }) => event === "transfer")?.["bytes"] as number;
  const elsewhere = (name: string) => join(filesystem().path, name);
  const zstd = ["--json", "--compress", "zstd:5", ...options];
  const places = [
    ["run", source, url(destination)],
    ["run", "-S", url(source), elsewhere("a")],
    ["run", "-S", url(source), url(elsewhere("b"))],
    ["copy", url(destination), elsewhere("c")],
    ["restore", url(destination), elsewhere("d")],
    ["restore", destination, url(elsewhere("e"))],
  ] as const;
  for (const [command, ...rest] of places) {
    const bytes = sent(await expectRun(0, [command, ...zstd, ...rest]));
    // From a host to itself nothing is compressed.
    const isBetween = !rest.every((one) => one.startsWith("ssh:") || one === "-S");
    expect(bytes < 4 << 20).toBe(isBetween);
    const at = rest.at(-1)?.replace(/^ssh:\/\/[^/]*/, "") as string;
    expect(
      sh(
        `cmp "$1/text" "$2/text" && echo same`,
        source,
        command === "restore" ? at : join(at, snapshotNames(at).at(-1) as string),
      ),
    ).toBe("same");
  }
  expectSound(destination, snapshots);
  // On one host there is nothing to gain.
  expect(sent(await expectRun(0, ["-S", ...zstd, source, elsewhere("f")]))).toBeGreaterThan(
    20 << 20,
  );
  expect(
    sent(await expectRun(0, ["-S", ...zstd, "--rate-limit", "512M", source, url(elsewhere("g"))])),
  ).toBeLessThan(4 << 20);
  expect(
    (
      await expectRun(0, [
        "-S",
        "-v",
        "debug",
        ...options,
        "--rate-limit",
        "1.5g",
        source,
        elsewhere("h"),
      ])
    ).stderr,
  ).toContain(`"rate":${1.5 * 2 ** 30}`);
});

test("a filter that is missing on the side that needs it is an error before anything is sent; one that fails leaves nothing", async () => {
  const { source, b } = pair();
  const { options, url, user } = await sshServer();
  const place = join(b.path, "x");
  const without = (name: string) => ({ env: { PATH: pathWithout(name) } });
  const shell = join(temporaryDirectory(), "shell");
  writeFileSync(shell, `#!/bin/bash\nPATH=${pathWithout("zstd")} exec dash "$@"\n`, {
    mode: 0o755,
  });
  user("nozstd", shell);
  expect(
    (await expectRun(1, [...options, "--compress", "zstd", source, url(place, "nozstd")])).stderr,
  ).toContain("nozstd@127.0.0.1: zstd not found: install zstd");
  expect(
    (await expectRun(1, [...options, "--compress", "zstd", source, url(place)], without("zstd")))
      .stderr,
  ).toContain("zstd not found: install zstd");
  expect(existsSync(place)).toBe(false);
  // It dies in the middle, on either side.
  sh(`head -c 30M /dev/urandom >"$1/large"`, source);
  const dying = temporaryDirectory();
  writeFileSync(join(dying, "zstd"), `#!/bin/sh\nhead -c 5M; kill -9 $$\n`, { mode: 0o755 });
  const env = { PATH: `${dying}:${process.env["PATH"]}` };
  writeFileSync(join(dying, "shell"), `#!/bin/bash\nPATH=${env.PATH} exec dash "$@"\n`, {
    mode: 0o755,
  });
  user("dying", join(dying, "shell"));
  await expectRun(1, [...options, "--compress", "zstd", source, url(place)], { env });
  await expectRun(1, [...options, "-S", "--compress", "zstd", source, url(place, "dying")]);
  expect(snapshotNames(place)).toEqual([]);
  await expectRun(0, [...options, "-S", "--wait", "30", "--compress", "zstd", source, url(place)]);
  expectSound(place, join(source, "snapshot"));
});

const NASTY = [
  `it's`,
  `"double"`,
  `$(touch pwned)`,
  "`touch pwned`",
  `a;touch pwned`,
  `back\\slash\\`,
  `bang!bang!!`,
  `-n --dash`,
  `ünï ☃`,
  ` two  spaces `,
  `star * [a] ?`,
  `~root {a,b} %1`,
  `#hash & | > <`,
];

test("names that look like syntax are names: source, destination, snapshot folder and prefix, here", async () => {
  const [a, b] = [filesystem(), filesystem()];
  for (const [i, name] of [...NASTY, "line\nbreak"].entries()) {
    const source = subvolume(join(a.path, name));
    sh(`echo "$2" >"$1/file"`, source, name);
    const prefix = `--snapshot-prefix=${name.replace("\n", "")}`;
    const args = [
      prefix,
      `--snapshot-folder=${name}-snapshots`,
      "-N",
      "1",
      "-n",
      "1",
      source,
      join(b.path, name),
    ];
    await expectRun(0, args);
    if (i < 3) {
      await nextSecond();
      await expectRun(0, args);
    }
    expect(snapshotNames(join(b.path, name), name.replace("\n", "")).length).toBe(1);
    expectSound(join(b.path, name), join(source, `${name}-snapshots`), name.replace("\n", ""));
  }
  expect(sh(`find "$1" "$2" . -maxdepth 4 -name 'pwned*'`, a.path, b.path)).toBe("");
});

for (const shell of ["bash", "dash", "ash", "fish", "tcsh"])
  test(`names that look like syntax are names on a host whose login shell is ${shell}`, async () => {
    const { options, url, user } = await sshServer();
    user(`login-${shell}`, loginShells()[shell] as string);
    const login = `login-${shell}`;
    const [a, b] = [filesystem(), filesystem()];
    for (const [i, name] of NASTY.entries()) {
      const source = subvolume(join(a.path, name));
      sh(
        `echo "$2" >"$1/file"; printf x >"$1/line
break"`,
        source,
        name,
      );
      const args = [
        ...options,
        `--snapshot-prefix=${name}`,
        `--snapshot-folder=${name}-snapshots`,
        "-N",
        "1",
        "-n",
        "1",
        url(source, login),
        url(join(b.path, name), login),
      ];
      await expectRun(0, args);
      if (i === 0) {
        await nextSecond();
        await expectRun(0, args);
      }
      expect(snapshotNames(join(b.path, name), name).length).toBe(1);
      expectSound(join(b.path, name), join(source, `${name}-snapshots`), name);
    }
    expect(readdirSync(a.path).length).toBe(NASTY.length);
    expect(
      sh(`find "$1" "$2" / /root -maxdepth 2 -name 'pwned*' 2>/dev/null`, a.path, b.path),
    ).toBe("");
  });

test("a user, host or path that could be an option or syntax is refused or taken as it is", async () => {
  const { source, destination } = pair();
  const { options, url, user } = await sshServer();
  expect((await expectRun(2, [source, "ssh://host/path\nwith a line"])).stderr).toContain(
    "line break",
  );
  for (const place of [
    "ssh://-oProxyCommand=touch%20pwned/backup",
    "ssh://-l@-F/backup",
    "ssh://x@$(touch pwned)/backup",
    "ssh://;touch pwned;@127.0.0.1/backup",
  ])
    await expectRun(1, [...options, "--ssh-opt", "ConnectTimeout=5", "-S", source, place]);
  expect(existsSync("pwned")).toBe(false);
  user("we ird", "/bin/bash");
  const odd = await expectRun(0, [...options, source, url(destination, "ünï")]).catch(() => null);
  expect(odd).toBeNull(); // no such user
  user("ünï", "/bin/bash");
  await expectRun(0, [...options, source, url(destination, "ünï")]);
  expect(snapshotNames(destination).length).toBeGreaterThan(0);
});

test("what a full backup over ssh brings is complete", async () => {
  const { source, snapshots, destination } = pair();
  const { options, url } = await sshServer();
  fill(subvolume(join(source, "..", "unrelated")));
  await expectRun(0, [...options, source, url(destination)]);
  expectSound(destination, snapshots);
  expect([...subvolumes(destination).values()][0]?.receivedUuid).toBe(
    [...subvolumes(snapshots).values()][0]?.uuid as string,
  );
});

test("a login shell that prints something of its own is refused: it would stand in the streams", async () => {
  const { source, b } = pair();
  const { options, url, user } = await sshServer();
  const shell = join(temporaryDirectory(), "noisy");
  writeFileSync(shell, `#!/bin/sh\necho welcome\nexec sh "$@"\n`, { mode: 0o755 });
  user("noisy", shell);
  const out = join(temporaryDirectory(), "out");
  expect(
    (await expectRun(1, [...options, url(source, "noisy"), `shell://cat >${out}`])).stderr,
  ).toContain("prints something of its own");
  expect(
    (await expectRun(1, [...options, source, url(join(b.path, "x"), "noisy")])).stderr,
  ).toContain("welcome");
  expect(existsSync(out)).toBe(false);
});

test("what a user's ssh configuration does for logins does nothing to a run", async () => {
  const { source, snapshots, destination } = pair();
  const { options, url } = await sshServer();
  const home = sh("getent passwd root | cut -d : -f 6");
  sh(`mkdir -p "$1/.ssh"`, home);
  const file = join(home, ".ssh/config");
  writeFileSync(
    file,
    `Host *\n${["RemoteCommand echo something else", "RequestTTY force", "StdinNull yes", "ForkAfterAuthentication yes", "SessionType none", "PermitLocalCommand yes", "LocalCommand echo local"].map((line) => `  ${line}\n`).join("")}`,
  );
  try {
    await expectRun(0, [...options, source, url(destination)]);
    expectSound(destination, snapshots);
  } finally {
    rmSync(file);
  }
});
