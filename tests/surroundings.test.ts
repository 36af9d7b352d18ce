// What stands around a run: the environment, signals, limits. None of it decides what becomes of backups.

import { expect, test } from "bun:test";
import {
  chmodSync,
  existsSync,
  mkdirSync,
  readdirSync,
  readFileSync,
  statSync,
  writeFileSync,
} from "node:fs";
import { join } from "node:path";
import {
  expectRun,
  nextSecond,
  pair,
  ROOT,
  sh,
  snapshotNames,
  start,
  temporaryDirectory,
  type How,
} from "./support/rig.ts";

test("nothing in the current directory is run, or comes into the environment", async () => {
  const { source } = pair();
  await expectRun(0, [source]);
  const foul = temporaryDirectory();
  const ran = join(foul, "ran");
  writeFileSync(
    join(foul, "foul.ts"),
    `require("node:fs").writeFileSync(${JSON.stringify(ran)}, "");`,
  );
  writeFileSync(join(foul, "bunfig.toml"), `preload = ["./foul.ts"]\n`);
  for (const file of [".env", ".env.local", ".env.production", ".env.development"])
    writeFileSync(join(foul, file), "FOUL=yes\n");
  const config = {
    imports: { "zx/core": "./foul.ts", citty: "./foul.ts" },
    compilerOptions: { paths: { "*": ["./foul.ts"] } },
  };
  for (const file of ["deno.json", "package.json", "tsconfig.json"])
    writeFileSync(join(foul, file), JSON.stringify(config));
  const path = `${join(ROOT, "node_modules/.bin")}:${process.env["PATH"]}`;
  const all: How[] = ["binary", "baseline", "deno", "one file by deno", "one file by node"];
  for (const how of [
    ...all,
    [join(ROOT, "btrfs-backup.ts")],
    [join(ROOT, "dist/btrfs-backup.js")],
  ]) {
    const told = join(temporaryDirectory(), "environment");
    await expectRun(0, ["-S", source, `shell://cat >/dev/null; env >${told}`], {
      how,
      cwd: foul,
      env: { PATH: path },
    });
    expect([
      how,
      existsSync(ran),
      /^PATH/m.test(readFileSync(told, "utf8")),
      /^FOUL/m.test(readFileSync(told, "utf8")),
    ]).toEqual([how, false, true, false]);
  }
});

test("a PATH that means the current directory, or nothing, runs no program of the source", async () => {
  const { source, snapshots, destination } = pair();
  mkdirSync(snapshots);
  const ran = join(temporaryDirectory(), "ran");
  for (const folder of [source, snapshots])
    for (const program of ["btrfs", "stat", "flock", "cat", "sh"])
      writeFileSync(
        join(folder, program),
        `#!/bin/sh\necho "$0" >>${ran}\nexec /usr/bin/${program} "$@"\n`,
        { mode: 0o755 },
      );
  for (const PATH of [
    ":/usr/bin:/bin",
    "/usr/bin::/bin",
    "/usr/bin:/bin:",
    ".:/usr/bin:/bin",
    "",
  ]) {
    await expectRun(0, ["-q", source, destination], { env: { PATH }, cwd: source });
    await nextSecond();
  }
  expect([existsSync(ran), snapshotNames(destination).length]).toEqual([false, 5]);
});

test("what the shell is told by its environment does not change what verbs do", async () => {
  const { source, destination } = pair();
  for (const options of ["nounset", "noexec", "xtrace"]) {
    const { stderr } = await expectRun(0, ["-q", source, destination], {
      env: { SHELLOPTS: options, BASHOPTS: "failglob" },
      wrapper: [
        "unshare",
        "--mount",
        "--",
        "/bin/sh",
        "-c",
        `mount --bind /bin/bash "$(readlink -f /bin/sh)"; exec env SHELLOPTS="$0" "$@"`,
        options,
      ],
    });
    expect(stderr).toBe("");
    await nextSecond();
  }
  expect(snapshotNames(destination).length).toBe(3);
});

test("nohup protects a run, and one is told how its children end where they are ignored", async () => {
  const { source, destination } = pair();
  const go = join(temporaryDirectory(), "go");
  const running = start(
    [source, `shell://cat >/dev/null; until [ -e ${go} ]; do sleep 0.1; done`],
    { wrapper: ["env", "--ignore-signal=HUP"] },
  );
  while (!running.stderr().includes("Sending")) await Bun.sleep(10);
  running.child.kill("SIGHUP");
  writeFileSync(go, "");
  expect(await running.finished).toMatchObject({ status: 0 });
  await nextSecond();
  await expectRun(0, ["-q", source, destination], { wrapper: ["env", "--ignore-signal=CHLD"] });
  expect(snapshotNames(destination).length).toBe(2);
});

test("--after-snapshot runs where no temporary file can be made", async () => {
  const { source } = pair();
  const [temporary, note] = [temporaryDirectory(), join(temporaryDirectory(), "note")];
  await expectRun(
    0,
    [
      "-q",
      "--before-snapshot",
      `echo before >>${note}; rm -rf ${temporary}`,
      "--after-snapshot",
      `echo after >>${note}`,
      source,
    ],
    { env: { TMPDIR: temporary } },
  );
  expect(readFileSync(note, "utf8")).toBe("before\nafter\n");
  expect(statSync("/dev/null").isCharacterDevice()).toBe(true);
});

test("metrics can be read by the exporter, whatever the umask is", async () => {
  const { source } = pair();
  const file = join(temporaryDirectory(), "x.prom");
  await expectRun(0, ["-q", "--metrics", file, source], {
    wrapper: ["/bin/sh", "-c", `umask 077; exec "$@"`, "sh"],
  });
  expect(statSync(file).mode & 0o777).toBe(0o644);
});

test("filters in rclone's environment hide no stream, which would be stored again over itself", async () => {
  const { source } = pair();
  const folder = temporaryDirectory();
  const store = `rclone://:local:${folder}`;
  const stored = () =>
    sh(`cd "$1"; ls *_full.btrfs*; sha256sum --check --quiet ./*.sha256`, folder);
  await expectRun(0, ["-q", source, store]);
  const first = stored();
  for (const [name, value] of [
    ["EXCLUDE", "*_full*"],
    ["MIN_SIZE", "1k"],
    ["FILTER", "- *.sha256"],
    ["MAX_AGE", "1ms"],
    ["INCLUDE", "*.txt"],
    ["DRY_RUN", "true"],
    ["ABSOLUTE", "true"],
    ["DIRS_ONLY", "true"],
    ["SEPARATOR", ";"],
  ]) {
    await nextSecond();
    await expectRun(0, ["-q", source, store], { env: { [`RCLONE_${name}`]: value as string } });
    expect([name, stored()]).toEqual([name, first]);
  }
  expect(readdirSync(folder).length).toBe(20);
  await expectRun(0, ["verify", "-q", store]);
});

test("how old a stored stream is, is told by its name, whatever the time zone is here", async () => {
  const { source } = pair();
  const store = `raw://${temporaryDirectory()}/s`;
  await expectRun(0, ["-q", source, store], { env: { TZ: "Asia/Tokyo" } });
  for (const TZ of ["America/New_York", "Asia/Tokyo", "Pacific/Auckland"])
    expect(
      (await expectRun(0, ["list", "--max-age", "1h", store], { env: { TZ } })).stdout,
    ).toMatch(/^OK: .*, \d+ (seconds?|minutes?) old/);
});

test("a user who cannot enter the current directory is told so", async () => {
  const closed = temporaryDirectory();
  chmodSync(closed, 0o700);
  const program = join(temporaryDirectory(), "btrfs-backup");
  sh(`cp "$1/dist/btrfs-backup" "$2"; chmod 755 "$2" "\${2%/*}"`, ROOT, program);
  const { stderr } = await expectRun(2, ["list", "/nowhere"], {
    how: [program],
    cwd: closed,
    wrapper: ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups"],
  });
  expect(stderr).toBe(
    "btrfs-backup: this user cannot enter the current directory: start in another, such as /\n",
  );
});
