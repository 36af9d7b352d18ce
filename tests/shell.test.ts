// Custom commands: what they are told, what is remembered of them, and that none takes half a
// stream for a whole one.

import { expect, test } from "bun:test";
import { existsSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  change,
  events,
  expectRun,
  expectSameTree,
  filesystem,
  gpgKey,
  nextSecond,
  pair,
  pathWithout,
  run,
  s3Server,
  sh,
  snapshotAs,
  snapshotNames,
  start,
  temporaryDirectory,
  waitFor,
} from "./support/rig.ts";
import { generator } from "./support/random.ts";
import { killAll } from "./support/processes.ts";

const uuidOf = (path: string) =>
  sh(`btrfs subvolume show "$1" | awk '/^\\tUUID/ { print $2 }'`, path);

test("a command gets a stream for each snapshot since the last, and is told what it is", async () => {
  const { source, snapshots } = pair();
  const out = temporaryDirectory();
  const command = `shell://cat >${out}/$BTRFS_BACKUP_NAME; env | grep ^BTRFS_BACKUP_ | grep -v RIG | sort >${out}/$BTRFS_BACKUP_NAME.env; echo "on stdout"`;
  for (const day of [1, 2]) snapshotAs(source, `p20260101-00000${day}`);
  const first = await expectRun(0, ["--json", "-S", "-p", "p", source, command]);
  expect(
    events(first)
      .filter(({ event }) => event === "transfer")
      .map(({ name }) => name),
  ).toEqual(["p20260101-000002"]); // the newest only
  for (const day of [3, 4]) snapshotAs(source, `p20260101-00000${day}`);
  await expectRun(0, ["-S", "-p", "p", source, command]);
  const environment = (name: string) =>
    Object.fromEntries(
      readFileSync(join(out, `${name}.env`), "utf8")
        .trim()
        .split("\n")
        .map((line) => line.split("=")),
    );
  expect(environment("p20260101-000002")).toEqual({
    BTRFS_BACKUP_NAME: "p20260101-000002",
    BTRFS_BACKUP_KIND: "full",
    BTRFS_BACKUP_PARENT: "",
    BTRFS_BACKUP_UUID: uuidOf(join(snapshots, "p20260101-000002")),
    BTRFS_BACKUP_PARENT_UUID: "",
    BTRFS_BACKUP_PATH: "",
    BTRFS_BACKUP_PREFIX: "p",
    BTRFS_BACKUP_SOURCE: source,
    BTRFS_BACKUP_SUFFIX: ".btrfs",
  });
  expect(environment("p20260101-000004")).toMatchObject({
    BTRFS_BACKUP_KIND: "incremental",
    BTRFS_BACKUP_PARENT: "p20260101-000003",
    BTRFS_BACKUP_PARENT_UUID: uuidOf(join(snapshots, "p20260101-000003")),
    BTRFS_BACKUP_PATH: "",
  });
  const target = filesystem();
  for (const n of [2, 3, 4])
    sh(`btrfs receive -q "$1" <"$2"`, target.path, join(out, `p20260101-00000${n}`));
  expectSameTree(join(snapshots, "p20260101-000004"), join(target.path, "p20260101-000004"));
  // Another command has a memory of its own.
  await expectRun(0, ["-S", "-p", "p", source, `${command} `]);
  expect(environment("p20260101-000004")).toMatchObject({ BTRFS_BACKUP_KIND: "full" });
});

test("with -I, or when the remembered parent is gone, a command gets a full stream of what is newer", async () => {
  const { source, snapshots } = pair();
  const out = temporaryDirectory();
  const command = `shell://cat >${out}/$BTRFS_BACKUP_NAME.$BTRFS_BACKUP_KIND`;
  snapshotAs(source, "20260101-000000");
  await expectRun(0, ["-S", source, command]);
  snapshotAs(source, "20260102-000000");
  await expectRun(0, ["-S", "-I", source, command]);
  sh(`btrfs subvolume delete "$1"/2026010[12]-000000 >/dev/null`, snapshots);
  snapshotAs(source, "20260103-000000");
  snapshotAs(source, "20260104-000000");
  await expectRun(0, ["-S", source, command]);
  expect(sh(`ls "$1"`, out).split("\n")).toEqual([
    "20260101-000000.full",
    "20260102-000000.full",
    "20260103-000000.full",
    "20260104-000000.incremental",
  ]);
});

test("the remembered parent stays at the source, however strict -N is", async () => {
  const { source, snapshots } = pair();
  snapshotAs(source, "20260101-000000");
  await expectRun(0, ["-S", source, "shell://cat >/dev/null"]);
  snapshotAs(source, "20260102-000000");
  snapshotAs(source, "20260103-000000");
  await expectRun(1, [
    "-S",
    "-N",
    "1",
    source,
    "shell://cat >/dev/null",
    "shell://cat >/dev/null; false",
  ]);
  expect(snapshotNames(snapshots).length).toBe(3); // one command has taken nothing yet
  await expectRun(0, ["-S", "-N", "1", source]);
  expect(snapshotNames(snapshots)).toEqual(["20260103-000000"]);
});

test("-n with only commands is a warning, as it was", async () => {
  const { source, destination } = pair();
  expect((await expectRun(0, ["-n", "3", source, "shell://cat >/dev/null"])).stderr).toContain(
    "a shell:// command cannot be asked",
  );
  await nextSecond();
  expect(
    (await expectRun(0, ["-n", "3", source, "shell://cat >/dev/null", destination])).stderr,
  ).not.toContain("cannot be asked");
});

test("gpg and aws store encrypted objects that restore in order", async () => {
  const { source, snapshots } = pair();
  const { endpoint, env } = await s3Server("bucket");
  const { env: gpg, recipient } = gpgKey();
  const random = generator(7);
  const command = `shell://gpg --batch --trust-model always --encrypt --recipient ${recipient} | aws s3 cp --endpoint-url ${endpoint} - s3://bucket/home/$BTRFS_BACKUP_NAME.btrfs.gpg`;
  for (let i = 0; i < 3; i++) {
    change(source, random);
    await expectRun(0, ["-q", source, command], { env: { ...env, ...gpg } });
    await nextSecond();
  }
  const target = filesystem();
  const environment = Object.entries({ ...env, ...gpg })
    .map(([name, value]) => `export ${name}='${value}'`)
    .join("; ");
  for (const name of snapshotNames(snapshots)) {
    sh(
      `${environment}; aws s3 cp --endpoint-url "$1" "s3://bucket/home/$2.btrfs.gpg" - | gpg --batch --quiet --decrypt | btrfs receive -q "$3"`,
      endpoint,
      name,
      target.path,
    );
    expectSameTree(join(snapshots, name), join(target.path, name));
  }
  expect(snapshotNames(target.path).length).toBe(3);
});

/** Whether a command at the end of a pipeline ever saw the end of its input. */
function witness(): { command: string; sawEnd: () => boolean } {
  const file = join(temporaryDirectory(), "end");
  return { command: `cat >/dev/null; echo end >${file}`, sawEnd: () => existsSync(file) };
}
const pins = (snapshots: string) =>
  existsSync(join(snapshots, ".btrfs-backup.json"))
    ? readFileSync(join(snapshots, ".btrfs-backup.json"), "utf8")
    : "";

test("a gpg key that does not exist fails the transfer, and nothing is remembered", async () => {
  const { source, snapshots } = pair();
  const { env } = gpgKey();
  const result = await expectRun(
    1,
    [
      source,
      "shell://gpg --batch --trust-model always --encrypt --recipient nobody@example.org | cat >/dev/null",
    ],
    { env },
  );
  expect(result.stderr).toContain("nobody@example.org");
  expect(pins(snapshots)).not.toContain("shell://");
  expect((await run(["-S", source, "shell://cat >/dev/null"])).stderr).toContain("in full");
});

test("a command that dies half-way fails the transfer, and nothing is remembered", async () => {
  const { source, snapshots } = pair();
  sh(`head -c 30M /dev/urandom >"$1/large"`, source);
  const { command } = witness();
  for (const dying of [
    "head -c 1000000 >/dev/null",
    "head -c 1000000 >/dev/null; exit 3",
    `head -c 1000000 | { kill -9 $$; ${command}; }`,
    `{ head -c 1000000; exit 5; } | { ${command}; }`,
  ]) {
    const result = await run([source, `shell://${dying}`]);
    expect([dying, result.status]).toEqual([dying, 1]);
  }
  expect(pins(snapshots)).not.toContain("shell://");
});

test("when btrfs send is killed half-way, no command sees the end of a half stream", async () => {
  const { source, snapshots } = pair();
  sh(`head -c 50M /dev/urandom >"$1/large"`, source);
  for (const sink of [witness(), { ...witness(), wrap: true }]) {
    const { command, sawEnd } = sink;
    const marker = join(temporaryDirectory(), "began");
    // Slow, so that the stream is still under way; the second one is a child of a child.
    const slow = `{ head -c 1000000 >/dev/null; echo began >${marker}; exec pv -q -L 2m; } | { ${command}; }`;
    const running = start([source, `shell://${"wrap" in sink ? `bash -c '${slow}'` : slow}`]);
    await waitFor("the stream to begin", () => existsSync(marker));
    killAll(/^btrfs send -q /);
    const { status, stderr } = await running.finished;
    expect([status, stderr]).toEqual([
      1,
      expect.stringContaining("btrfs send was killed by signal 9"),
    ]);
    expect(sawEnd()).toBe(false);
    await nextSecond();
  }
  expect(pins(snapshots)).not.toContain("shell://");
});

test("a command that ignores SIGTERM sees no end either", async () => {
  const { source } = pair();
  sh(`head -c 50M /dev/urandom >"$1/large"`, source);
  const { command, sawEnd } = witness();
  const marker = join(temporaryDirectory(), "began");
  const running = start([
    source,
    `shell://trap '' TERM; { head -c 1000000 >/dev/null; echo began >${marker}; exec pv -q -L 2m; } | { ${command}; }`,
  ]);
  await waitFor("the stream to begin", () => existsSync(marker));
  killAll(/^btrfs send -q /);
  expect((await running.finished).status).toBe(1);
  expect(sawEnd()).toBe(false);
});

test("where there is no bash, commands run under sh", async () => {
  const { source } = pair();
  const tools = pathWithout("bash");
  const out = join(temporaryDirectory(), "out");
  const result = await expectRun(0, [source, `shell://cat >${out}; echo "$0" >${out}.shell`], {
    env: { PATH: tools },
  });
  expect(readFileSync(`${out}.shell`, "utf8")).toBe("sh\n");
  expect(result.stderr).toContain("pipefail");
  expect(existsSync(out)).toBe(true);
});

test("a command of a killed run and the next run never store side by side", async () => {
  const { source, snapshots } = pair();
  const directory = temporaryDirectory();
  const command = `shell://cat >>${directory}/out; echo x >>${directory}/started; while [ -e ${directory}/gate ]; do sleep 0.05; done`;
  writeFileSync(join(directory, "gate"), "");
  const running = start([source, command]);
  await waitFor("the command", () => existsSync(join(directory, "started")));
  running.child.kill("SIGKILL");
  await running.finished;
  expect((await expectRun(3, ["-S", source, command])).stderr).toContain("still");
  const waiting = start(["-S", "--wait", "60", source, command]);
  rmSync(join(directory, "gate"));
  expect((await waiting.finished).status).toBe(0);
  expect(pins(snapshots)).toContain("shell://");
});

test("what a command or a hook leaves running does not hold a run up", async () => {
  const { source } = pair();
  const left = () => sh(`pgrep -cfx 'sleep 4321' || :`);
  await expectRun(0, [
    "--after-snapshot",
    "sleep 4321 &",
    source,
    "shell://cat >/dev/null; (sleep 4321 >/dev/null 2>&1 </dev/null &)",
  ]);
  expect(left()).toBe("2");
  await nextSecond();
  await expectRun(0, [source, "shell://cat >/dev/null"]); // nor its lock
  killAll(/^sleep 4321$/);
});

test("a hook's exit status is its own, whatever ours mean", async () => {
  const { source } = pair();
  for (const status of [64, 66, 75, 76]) {
    const result = await expectRun(1, ["--before-snapshot", `echo why; exit ${status}`, source]);
    expect(result.stderr).toContain(`why\n(exit status ${status})`);
    expect(result.stderr).not.toContain("    at ");
  }
});
