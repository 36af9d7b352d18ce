// Every source of the machine in one run: `all`, and `list` and `check` without arguments.

import { describe, expect, test } from "bun:test";
import { chmodSync, existsSync, readFileSync, writeFileSync } from "node:fs";
import { basename, join } from "node:path";
import {
  events,
  expectRun,
  expectSound,
  filesystem,
  fill,
  holdLock,
  nextSecond,
  ROOT,
  sh,
  snapshotNames,
  sshServer,
  start,
  subvolume,
  temporaryDirectory,
  waitFor,
} from "./support/rig.ts";

/** Sources on one filesystem, a place for backups on another, and a directory of argument files. */
function machine(...names: string[]) {
  const [a, b] = [filesystem({ size: "1G" }), filesystem({ size: "1G" })];
  const directory = temporaryDirectory();
  const sources = names.map((name) => {
    const path = subvolume(join(a.path, name));
    fill(path);
    return path;
  });
  const at = (name: string) => join(b.path, name);
  const write = (name: string, ...lines: string[]) =>
    writeFileSync(join(directory, name), lines.map((line) => `${line}\n`).join(""));
  return { a, b, sources, at, directory, write, all: ["all", "--config-dir", directory] };
}
const namesIn = (folder: string) => (existsSync(folder) ? snapshotNames(folder) : []);
const snapshotsOf = (source: string) => namesIn(join(source, "snapshot"));

describe("all", () => {
  test("runs every argument file; what is broken or fails keeps no other, and the worst exit status tells", async () => {
    const { sources, at, directory, write, all } = machine("home", "srv", "web");
    const [home = "", srv = "", web = ""] = sources;
    const [metrics, own] = [join(directory, "all.prom"), join(directory, "srv.prom")];
    write("home.args", "# a comment", "-N 1", home, at("home"));
    write("srv.args", "--metrics", own, "-p of-srv-", srv, at("srv"));
    write("web.args", web, "/nowhere/at/all");
    write("wrong.args", "# nothing is done with it", "", "-N many", home, at("wrong"));
    write("looping.args", home, "@looping.args");
    write("empty.args");
    write(".home.args.17", "--nonsense");
    write(".hidden.args", "--nonsense");
    write("note", "--nonsense");
    // Nothing is done for a name that is not there.
    const unknown = await expectRun(2, [...all, "home", "sv"]);
    expect(unknown.stderr).toContain(`there is no ${directory}/sv.args; did you mean srv?`);
    const path = await expectRun(2, [...all, join(directory, "srv.args")]);
    expect(path.stderr).toContain("is a path: name the files of");
    const dry = await expectRun(0, [...all, "--dry-run", "home", "srv.args"]);
    expect(dry.stderr).toContain("srv: Would take snapshot of-srv-");
    expect(dry.stderr).toContain("Nothing was changed: 2 sources\n");
    expect([snapshotsOf(home), existsSync(at("home")), existsSync(own)]).toEqual([
      [],
      false,
      false,
    ]);

    // What is typed comes last, and so is heard over a file that is quiet.
    write("quiet.args", "--quiet", home);
    for (const [words, isHeard] of [
      [[], false],
      [["-v", "info"], true],
      [["-q", "-v", "info"], true],
      [["-v", "info", "-q"], false],
    ] as const) {
      const { stderr } = await expectRun(0, [...all, "--dry-run", ...words, "quiet"]);
      expect([words, stderr.includes("Would take snapshot")]).toEqual([words, isHeard]);
    }
    sh(`rm "$1/quiet.args"`, directory);

    const first = await expectRun(2, [...all, "--json", "--metrics", metrics]);
    expect(first.stderr).toContain(`${directory}/wrong.args, line 3: "many" is not a retention`);
    expect(first.stderr).toContain(
      `${directory}/looping.args, line 2: argument files include each`,
    );
    const told = events(first);
    for (const event of told) {
      expect(Object.keys(event)).toContain("source");
      expect(Object.keys(event)).toContain("args");
    }
    expect(
      told
        .filter(({ event }) => event === "transfer")
        .map(({ args, source, destination }) => [args, source, destination])
        .sort(),
    ).toEqual([
      ["home", home, at("home")],
      ["srv", srv, at("srv")],
    ]);
    expect(told.at(-1)).toEqual({
      event: "all",
      args: null,
      source: null,
      ok: false,
      status: 2,
      sources: [
        { args: "home", source: home, status: 0 },
        { args: "looping", source: null, status: 2 },
        { args: "srv", source: srv, status: 0 },
        { args: "web", source: web, status: 1 },
        { args: "wrong", source: null, status: 2 },
      ],
    });
    // One table, in the order of the files.
    const table = first.stderr.split("Done: 5 sources, 3 of them with errors\n")[1] ?? "";
    const rows = table
      .trimEnd()
      .split("\n")
      .map((line) => line.trim().split(/\s{2,}/));
    expect(rows.map(([name = ""]) => name)).toEqual([
      "sent",
      "home",
      at("home"),
      "looping",
      "srv",
      at("srv"),
      "web",
      "/nowhere/at/all",
      "wrong",
    ]);
    expect(rows.map((cells) => cells.at(-1))).toEqual(
      expect.arrayContaining([
        "refused",
        expect.stringMatching(/^failed: no such directory/),
      ]) as never,
    );
    expectSound(at("home"), join(home, "snapshot"));
    expectSound(at("srv"), join(srv, "snapshot"), "of-srv-");
    expect([existsSync(at("wrong")), snapshotsOf(web)]).toEqual([false, []]);
    const text = readFileSync(metrics, "utf8");
    for (const [source, place] of [
      [home, at("home")],
      [srv, at("srv")],
    ])
      expect(text).toMatch(
        new RegExp(
          `^btrfs_backup_sent_bytes\\{source="${source}",destination="${place}"\\} \\d+$`,
          "m",
        ),
      );
    expect(text).toMatch(new RegExp(`^btrfs_backup_errors\\{source="${web}",.*\\} 1$`, "m"));
    expect(text).toContain("\nbtrfs_backup_broken_files 2\n");
    expect(text.match(/^# TYPE btrfs_backup_errors/gm)?.length).toBe(1);
    expect(readFileSync(own, "utf8")).toContain(`{source="${srv}",destination="${at("srv")}"}`);

    // A good run of those that are named is silent, and does what each file says.
    await nextSecond();
    const quiet = await expectRun(0, [...all, "--quiet", "srv", "home"]);
    expect([quiet.stdout, quiet.stderr]).toEqual(["", ""]);
    expect([snapshotsOf(home).length, snapshotNames(at("home")).length]).toEqual([1, 2]);
    expect(snapshotNames(at("srv"), "of-srv-").length).toBe(2);
  });

  test("files that others can change are not read, nor is a directory of others", async () => {
    const { sources, at, directory, write, all } = machine("home", "srv");
    const [home = "", srv = ""] = sources;
    write("home.args", home, at("home"));
    write("srv.args", "--before-snapshot", `touch ${directory}/pwned`, srv, at("srv"));
    chmodSync(join(directory, "srv.args"), 0o666);
    const { stderr } = await expectRun(2, all);
    expect(stderr).toContain(`others can change ${directory}/srv.args`);
    expect([snapshotsOf(home).length, snapshotsOf(srv).length]).toEqual([1, 0]);
    chmodSync(directory, 0o777);
    expect((await expectRun(2, all)).stderr).toContain(`others can change ${directory}, and so`);
    chmodSync(directory, 0o700);
    expect(existsSync(join(directory, "pwned"))).toBe(false);
    const none = await expectRun(2, ["all", "--config-dir", join(directory, "none")]);
    expect(none.stderr).toContain(`"btrfs-backup setup" makes one`);
    for (const [command = "", what] of [
      ["list", "LOCATION… is missing, and there is no argument file"],
      ["check", "SOURCE is missing, and there is no argument file"],
    ])
      expect(
        (await expectRun(2, [command, "--config-dir", join(directory, "none")])).stderr,
      ).toContain(what as string);
  });

  test("two files of one SOURCE have their turns; a lock that another run holds is 3, which is less than 1", async () => {
    const { sources, at, write, all, b } = machine("home", "srv");
    const [home = "", srv = ""] = sources;
    for (const place of ["here", "there", "stored"])
      write(`home-${place}.args`, home, place === "stored" ? `raw://${at(place)}` : at(place));
    // The same source by another path.
    sh(`mkdir "$2/other"; mount --bind "$1" "$2/other"`, home, b.path);
    write(
      "bound.args",
      "--skip-fs-checks",
      "-f",
      join(home, "snapshot"),
      join(b.path, "other"),
      at("bound"),
    );
    write("srv.args", srv, at("srv"));
    await expectRun(0, all);
    for (const place of ["here", "there", "bound"])
      expect([place, snapshotNames(at(place)).length > 0]).toEqual([place, true]);
    sh(`umount "$1/other"; rm "$2/bound.args"`, b.path, all[2] as string);
    expect(snapshotsOf(home).length).toBe(4);
    const unlock = await holdLock(join(srv, "snapshot/.btrfs-backup..lock"));
    const busy = await expectRun(3, all);
    expect(busy.stderr).toMatch(/^srv .* busy$/m);
    expect(snapshotNames(at("here")).length).toBeGreaterThan(2);
    write("web.args", join(b.path, "none"), "/nowhere/at/all");
    write("home-here.args", "--no-transfer", "--before-snapshot", "false", home);
    expect((await expectRun(1, [...all, "srv", "home-here"])).stderr).toContain("home-here: ");
    expect((await expectRun(2, [...all, "srv", "home-here", "web"])).stderr).toContain("no such");
    await unlock();
  });

  test("on a terminal, all streams have their lines, which say whose they are", () => {
    const { sources, at, directory, write } = machine("home", "srv");
    for (const source of sources) {
      const name = basename(source);
      sh(`head -c 20M /dev/urandom >"$1/large"`, source);
      write(`${name}.args`, "--rate-limit 10M", source, at(name));
    }
    const drawn = sh(
      `log=$1; shift; script -qec "$*" "$log" >/dev/null; cat "$log"`,
      join(directory, "typescript"),
      join(ROOT, "dist/btrfs-backup"),
      "all",
      "--config-dir",
      directory,
    );
    for (const source of sources)
      expect(drawn).toMatch(new RegExp(`${basename(source)}: [^\\n]* [0-9.]+M/s 0:00:0\\d\\r\\n`));
    expect(drawn).toContain("\x1b[2A\x1b[J");
    expect(drawn).toContain("Done: 2 sources\r\n");
  });

  test("between its hooks a source is alone, so that nobody starts what it has stopped", async () => {
    const { sources, at, directory, write, all } = machine("a", "b", "c");
    const log = join(directory, "log");
    const say = (word: string, i: number) => `echo ${word} ${i} >>${log}`;
    for (const [i, source] of sources.entries())
      write(
        `${i}.args`,
        `--before-snapshot ${say("stop", i)}; sleep 0.2`,
        `--after-snapshot ${say("start", i)}`,
        source,
        at(String(i)),
      );
    await expectRun(0, all);
    const told = readFileSync(log, "utf8").trimEnd().split("\n");
    expect(told.length).toBe(6);
    for (let i = 0; i < 6; i += 2)
      expect(told[i + 1]).toBe((told[i] as string).replace("stop", "start"));
  });

  test("Ctrl-C ends all that are at work, cleanly, and begins no other", async () => {
    const { sources, at, directory, write, all } = machine("a", "b", "c");
    for (const [i, source] of sources.entries())
      write(
        `${i}.args`,
        source,
        at(String(i)),
        `shell://echo $$ >${directory}/${i}.pid; exec sleep 600`,
      );
    const running = start([...all, "--jobs", "2"]);
    const pid = (i: number) => sh(`cat "$1" 2>/dev/null || :`, join(directory, `${i}.pid`));
    await waitFor("two sources", () => pid(0) !== "" && pid(1) !== "");
    process.kill(running.pid, "SIGINT");
    const { status, stderr } = await running.finished;
    expect([status, stderr.match(/\[error\]/g)?.length]).toEqual([130, 1]);
    for (const i of [0, 1]) expect(existsSync(`/proc/${pid(i)}`)).toBe(false);
    expect([existsSync(join(directory, "2.pid")), snapshotsOf(sources[2] as string)]).toEqual([
      false,
      [],
    ]);
    for (const i of [0, 1]) write(`${i}.args`, sources[i] as string, at(String(i)));
    await nextSecond();
    await expectRun(0, [...all, "0", "1"]);
    for (const i of [0, 1]) expectSound(at(String(i)), join(sources[i] as string, "snapshot"));
  });

  test("sources share one connection to a host, at once and one after another; other ssh options, and so another key, have their own", async () => {
    const { options, url, guarded } = await sshServer();
    const { sources, at, directory, write, all } = machine("a", "b", "c");
    const [a = "", b = "", c = ""] = sources;
    const log = join(directory, "log");
    // A hook runs on SOURCE's host, and is told over which connection.
    const hook = ["--before-snapshot", `echo $SSH_CONNECTION >>${log}`];
    const lines = (words: string[]) =>
      words.flatMap((word, i) => (i % 2 === 0 ? [`${word} ${words[i + 1]}`] : []));
    write("a.args", ...lines(options), ...hook, url(a), at("a"), url(at("far")));
    write("b.args", ...lines(options), ...hook, url(b), at("b"));
    // That one asks for its passphrase.
    const other = guarded("--path", c, "--path", b, "--source");
    const [, key = ""] = /IdentityFile=(\S+)/.exec(other.join(" ")) ?? [];
    const ask = join(directory, "ask");
    writeFileSync(ask, `#!/bin/sh\necho asked >>${log}.asked\necho secret\n`, { mode: 0o755 });
    sh(`ssh-keygen -q -p -P "" -N secret -f "$1"`, key);
    const env = { SSH_ASKPASS: ask, SSH_ASKPASS_REQUIRE: "force" };
    write("c.args", ...lines(other), url(c), at("c"));
    write("e.args", "-p e-", ...lines(other), url(b), at("e"));
    write("dead.args", ...lines(options), b, "ssh://127.0.0.1:1/x");
    for (const jobs of ["4", "1"]) {
      const { stderr } = await expectRun(1, [...all, "--jobs", jobs], { env });
      expect(stderr).toContain("dead: ssh://127.0.0.1:1/x: ");
      const ports = readFileSync(log, "utf8").trimEnd().split("\n");
      expect([ports.length, new Set(ports).size]).toEqual([2, 1]);
      expect(readFileSync(`${log}.asked`, "utf8")).toBe("asked\n");
      sh(`rm "$1" "$1.asked"`, log);
      await nextSecond();
    }
    for (const [i, name] of ["a", "b", "c"].entries())
      expectSound(at(name), join(sources[i] as string, "snapshot"));
    expectSound(at("e"), join(b, "snapshot"), "e-");
    // Nothing of it is left.
    expect(sh(`pgrep -x ssh || :`)).toBe("");
  });
});

describe("without arguments", () => {
  test("list shows each SOURCE and its destinations, and check looks at each next run", async () => {
    const { sources, at, directory, write, all } = machine("home", "srv");
    const [home = "", srv = ""] = sources;
    write("home.args", "-p of-home-", home, at("home"));
    write("srv.args", srv, at("srv"), `raw://${at("stored")}`);
    await expectRun(0, all);
    const where = ["--config-dir", directory];
    const list = await expectRun(0, ["list", ...where]);
    for (const word of ["home:", "srv:", home, srv, at("home"), at("srv"), `raw://${at("stored")}`])
      expect(list.stdout).toContain(word);
    expect(list.stdout.indexOf("home:")).toBeLessThan(list.stdout.indexOf("srv:"));
    const told = events(await expectRun(0, ["list", "--json", ...where]));
    expect(
      told
        .filter(({ event }) => event === "list")
        .map(({ args, source, prefix, locations }) => [args, source, prefix, locations?.length]),
    ).toMatchObject([
      ["home", home, "of-home-", 2],
      ["srv", srv, "", 3],
    ]);
    await expectRun(0, ["list", "--max-age", "1d", ...where]);
    const check = await expectRun(0, ["check", ...where]);
    for (const word of [home, srv, at("home"), at("srv")]) expect(check.stdout).toContain(word);
    write("wrong.args", home, "--nonsense");
    for (const command of ["list", "check"]) {
      const { stderr, stdout } = await expectRun(2, [command, ...where]);
      expect(stderr).toContain("wrong.args, line 2: unknown option --nonsense");
      expect(stdout).toContain(srv);
    }
    sh(`rm "$1/wrong.args"; btrfs -q subvolume delete "$2"/2*`, directory, at("srv"));
    sh(`rm -r "$1"`, at("srv"));
    const gone = events(await expectRun(1, ["check", "--json", "-q", ...where]));
    expect(gone.filter(({ level }) => level === "fail")).toMatchObject([
      { args: "srv", source: srv, place: at("srv") },
    ]);
    for (const args of [
      ["list", home, ...where],
      ["check", home, at("home"), ...where],
    ])
      expect((await expectRun(2, args)).stderr).toContain("name no places with it");
    expect((await expectRun(2, ["check", "-N", "3", ...where])).stderr).toContain(
      "SOURCE is missing: --num-snapshots counts for one",
    );
  });
});

test("two SOURCEs on one command line are a usage error that says how it is done; no DEST is taken for one", async () => {
  const { sources, at, b, write, all } = machine("home", "srv");
  const [home = "", srv = ""] = sources;
  const refused = async (...args: string[]) => {
    const before = [snapshotsOf(home), namesIn(at("all"))];
    const { stderr } = await expectRun(2, args);
    expect(stderr.trimEnd().split("\n").length).toBe(1);
    for (const word of [
      "looks like a second SOURCE: a command line has one SOURCE",
      "/etc/btrfs-backup/NAME.args",
      '"btrfs-backup all"',
    ])
      expect(stderr).toContain(word);
    expect([snapshotsOf(home), namesIn(at("all"))]).toEqual(before);
  };
  // It lies on SOURCE's own filesystem, where no backup belongs.
  await refused(home, srv, at("all"));
  await refused("--dry-run", home, srv, at("all"));
  // It lies elsewhere, and has snapshots of its own.
  const mail = subvolume(join(b.path, "mail"));
  await expectRun(0, [mail, `raw://${join(temporaryDirectory(), "mail")}`]);
  await refused(home, mail, at("all"));
  // No false alarm: the last one is DEST, whatever it is; and what has backups is a DEST already.
  await expectRun(1, [home, at("all"), srv]);
  const vault = subvolume(join(filesystem().path, "vault"));
  await nextSecond();
  await expectRun(0, [home, vault, at("all")]);
  await nextSecond();
  await expectRun(0, ["-f", "own", vault, at("vault")]);
  write("srv.args", "-p srv-", "-f own", srv, vault, at("srv"));
  await nextSecond();
  await expectRun(0, all);
  await expectRun(0, [home, vault, at("all")]);
  expectSound(vault, join(home, "snapshot"));
  // An empty subvolume is a place for a mount: the disk is away, and the others are served.
  await nextSecond();
  const empty = subvolume(join(home, "../empty"));
  expect((await expectRun(1, [home, empty, at("all")])).stderr).toContain("is the disk mounted?");
  expectSound(at("all"), join(home, "snapshot"));
});

test("systemd finds no fault with the units, and cron.daily is one line", () => {
  const units = temporaryDirectory();
  sh(
    `cd "$1"; cp "$2"/btrfs-backup.{service,timer} "$2"/btrfs-backup@.{service,timer} .
    sed -i 's,/usr/local/sbin/btrfs-backup,/bin/true,' ./*.service`,
    units,
    join(ROOT, "scripts"),
  );
  for (const unit of ["btrfs-backup", "btrfs-backup@home"])
    expect(
      sh(`cd "$1"; systemd-analyze verify --man=no ./"$2".{service,timer} 2>&1`, units, unit),
    ).toBe("");
  const hardening = (name: string) =>
    readFileSync(join(ROOT, "scripts", name), "utf8").split("UnsetEnvironment")[1];
  expect(hardening("btrfs-backup.service")).toBe(hardening("btrfs-backup@.service") as string);
  const cron = readFileSync(join(ROOT, "scripts/cron.daily"), "utf8").trimEnd().split("\n");
  expect(cron.filter((line) => !line.startsWith("#")).length).toBe(1);
});
