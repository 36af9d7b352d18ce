// The man pages, the manual in the program, and the completions, which scripts/build makes of the program's own definitions and of
// scripts/manual; in the real man and shells.

import { expect, test } from "bun:test";
import { existsSync, mkdirSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import {
  blocksOf,
  chaptersOf,
  chapterText,
  COMMANDS,
  manualOf,
  type Option,
  OPTIONS,
  stretchesOf,
} from "../btrfs-backup.ts";
import {
  pair,
  expectRun,
  nextSecond,
  ROOT,
  sh,
  snapshotNames,
  temporaryDirectory,
} from "./support/rig.ts";

const DIST = join(ROOT, "dist");
const MANUAL = join(ROOT, "scripts/manual");
const chapters = chaptersOf(
  new Map(readdirSync(MANUAL).map((name) => [name, readFileSync(join(MANUAL, name), "utf8")])),
);
const every = Object.entries(COMMANDS).map(([name, command]) => ({ name, ...manualOf(command) }));

test("the man page has no fault, and tells of every command and option", () => {
  expect(sh(`groff -man -Tutf8 -ww -z "$1" 2>&1`, join(DIST, "btrfs-backup.8"))).toBe("");
  const page = sh(
    `MANWIDTH=400 man --warnings -E ascii -P cat -l "$1" 2>&1 | col -b`,
    join(DIST, "btrfs-backup.8"),
  );
  for (const { name, usage, description, groups } of every) {
    expect(page).toContain(usage.replaceAll("…", "..."));
    if (name !== "run")
      expect(page.replace(/\s+/g, " ")).toContain(`${name} ${description}`.replace(/\s+/g, " "));
    for (const { name, hint, description } of groups.flatMap(([, options]) => options)) {
      expect(page).toContain(`--${name}${hint === null ? "" : ` ${hint}`}`);
      expect(page.replace(/\s+/g, " ")).toContain(description.replace(/\s+/g, " "));
    }
  }
});

/** What the program gets when this is typed into an interactive shell, with a tab at the end. */
async function typed(shell: "bash" | "zsh", line: string, directory = "/"): Promise<string> {
  const setup = {
    bash: `bind 'set enable-bracketed-paste off'; bind 'set bell-style none'; source ${DIST}/btrfs-backup.bash`,
    zsh: `unsetopt beep; fpath=(${DIST} $fpath); autoload -Uz compinit; compinit -D`,
  }[shell];
  const child = Bun.spawn(
    [
      "script",
      "-qec",
      { bash: "bash --norc --noprofile -i", zsh: "zsh -f -i" }[shell],
      "/dev/null",
    ],
    {
      cwd: directory,
      stdin: "pipe",
      stdout: "pipe",
      stderr: "ignore",
      env: { PATH: process.env["PATH"] ?? "", HOME: directory, TERM: "dumb", LC_ALL: "C.UTF-8" },
    },
  );
  const decoder = new TextDecoder();
  const output = child.stdout.getReader();
  let said = "";
  const until = async (end: RegExp) => {
    for (let found = end.exec(said); ; found = end.exec(said)) {
      if (found !== null) return found[1] ?? "";
      const { done, value } = await output.read();
      if (done) throw new Error(`${shell} ended: ${said}`);
      said += decoder.decode(value, { stream: true });
    }
  };
  try {
    // The words are put together behind the echo of what is typed, which therefore cannot be taken for them.
    child.stdin.write(
      ` ${setup}; btrfs-backup() { printf '%s{%s' GOT ''; printf '<%s>' "$@"; printf '}%s' END; }; PS1=REA''DY; PS2=\n`,
    );
    await until(/READY/);
    child.stdin.write(`btrfs-backup ${line}\t\n`);
    return await until(/GOT\{(.*?)\}END/s);
  } finally {
    child.kill("SIGKILL");
    await child.exited;
  }
}

/** What fish offers for this, by its own account. */
const offered = (line: string, directory = "/") =>
  sh(
    `cd "$3"; HOME=$3 fish --no-config -c 'source $argv[1]; complete -C $argv[2]' "$1" "btrfs-backup $2"`,
    join(DIST, "btrfs-backup.fish"),
    line,
    directory,
  )
    .split("\n")
    .map((one) => one.split("\t")[0] as string)
    .filter(Boolean);

/** A source with a backup, and the only snapshot's name. */
async function backedUp() {
  const made = pair();
  await expectRun(0, [made.source, made.destination]);
  return { ...made, name: snapshotNames(made.destination)[0] as string };
}

for (const shell of ["bash", "zsh"] as const)
  test(`${shell} completes commands, options, choices, paths, and snapshots' names`, async () => {
    const { source, destination, name } = await backedUp();
    const directory = temporaryDirectory();
    mkdirSync(join(directory, "backups"));
    sh(`: >"$1/home.args"; : >"$1/letter"`, directory);
    expect(await typed(shell, "rest")).toBe("<restore>");
    expect(await typed(shell, "--num-sn")).toBe("<--num-snapshots>");
    expect(await typed(shell, "restore --repl")).toBe("<restore><--replace>");
    expect(await typed(shell, "hel")).toBe("<help>");
    expect(await typed(shell, "help retent")).toBe("<help><retention>");
    expect(await typed(shell, "list --repl")).toBe("<list><--repl>");
    expect(await typed(shell, "list --verbosity w")).toBe("<list><--verbosity><warning>");
    expect(await typed(shell, "-v w")).toBe("<-v><warning>");
    expect(await typed(shell, "--verbosity=w")).toBe("<--verbosity=warning>");
    expect(await typed(shell, "list back", directory)).toMatch(/^<list><backups\/?>$/); // zsh takes the slash away again
    expect(await typed(shell, "versions let", directory)).toBe("<versions><letter>");
    expect(await typed(shell, "-q @ho", directory)).toBe("<-q><@home.args>");
    expect(await typed(shell, `restore ${destination} /target --snapshot `)).toBe(
      `<restore><${destination}></target><--snapshot><${name}>`,
    );
    expect(await typed(shell, `restore raw://${destination} /target --snapshot=2`)).toBe(
      `<restore><raw://${destination}></target><--snapshot=${name}>`,
    );
    expect(await typed(shell, `verify ${source} --snapshot 2`)).toBe(
      `<verify><${source}><--snapshot><${name}>`,
    );
    expect(await typed(shell, `versions ${source}/some/file --get 2`)).toBe(
      `<versions><${source}/some/file><--get><${name}>`,
    );
    expect(await typed(shell, `keep ${destination} 2`, directory)).toBe(
      `<keep><${destination}><${name}>`,
    );
  });

/** A man page, as a terminal of many columns shows it. */
const shownPage = (name: string) =>
  sh(`MANWIDTH=9000 man --warnings -E UTF-8 -P cat -l "$1" 2>&1 | col -b`, join(DIST, name));

test("the guide has no fault, and the chapters of the manual stand in one page each", () => {
  expect(sh(`groff -man -Tutf8 -ww -z "$1" 2>&1`, join(DIST, "btrfs-backup-guide.7"))).toBe("");
  const pages = {
    guide: shownPage("btrfs-backup-guide.7"),
    reference: shownPage("btrfs-backup.8"),
  };
  const squeezed = (text: string) => text.replaceAll("…", "...").replace(/\s+/g, "");
  for (const { topic, title, part, text } of chapters) {
    expect(pages[part]).toMatch(
      new RegExp(`^${title.toUpperCase().replace("…", "\\.\\.\\.")}$`, "m"),
    );
    // Every word and every line of code of it.
    const page = squeezed(pages[part]);
    for (const one of blocksOf(text)) {
      const texts = one.kind === "table" ? one.rows.slice(1).flat() : [one.text];
      for (const some of texts) {
        const words =
          one.kind === "code"
            ? some
            : stretchesOf(some)
                .map((s) => s.text)
                .join("");
        const found = page.includes(squeezed(words));
        expect([topic, words, found]).toEqual([topic, words, true]);
      }
    }
  }
});

test("help prints each chapter of the manual, and lists them; the executable alone has them", async () => {
  const directory = temporaryDirectory();
  sh(`cp "$1/btrfs-backup" "$1/btrfs-backup.js" "$2"`, DIST, directory);
  const alone = [join(directory, "btrfs-backup")];
  const { stdout: list } = await expectRun(0, ["help"], { how: alone });
  expect(list.split("\n").length).toBeLessThan(50);
  for (const chapter of chapters) {
    expect(list).toContain(`  ${chapter.topic.padEnd(16)}${chapter.title}\n`);
    const { stdout } = await expectRun(0, ["help", chapter.topic], { how: alone });
    expect(stdout).toBe(chapterText(chapter, 80, false));
    for (const line of stdout.split("\n")) {
      // What is to be copied is not broken into lines.
      const isCode = chapter.text.includes(line.trim());
      expect([chapter.topic, line.length <= 80 || isCode, line]).toEqual([
        chapter.topic,
        true,
        line,
      ]);
    }
  }
  const whole = (await expectRun(0, ["help", "guide"], { how: alone })).stdout;
  expect((await expectRun(0, ["help", "guide"], { how: "bun" })).stdout).toBe(whole);
  expect(sh(`node "$1" help guide`, join(directory, "btrfs-backup.js"))).toBe(whole.trimEnd());
  const { stderr } = await expectRun(2, ["help", "securty"], { how: alone });
  expect(stderr).toContain("did you mean security?");
  // Where there is a terminal, through a pager.
  const shown = sh(
    `PAGER='sed s/^/PAGED:/' script -qec "$1 help security" /dev/null </dev/null`,
    join(directory, "btrfs-backup"),
  );
  expect(shown).toContain("PAGED:");
  expect(shown).toContain("\x1b[1mSECURITY\x1b[0m");
  for (const pager of ["", "cat", "no-such-pager"])
    expect(
      sh(
        `PAGER=$2 script -qec "$1 help security" /dev/null </dev/null`,
        join(directory, "btrfs-backup"),
        pager,
      ),
    ).toContain("a thief with a push key");
});

test("every option is mentioned in a chapter of the manual or the README, and what messages refer to is a topic", () => {
  const program = readFileSync(join(ROOT, "btrfs-backup.ts"), "utf8");
  const topics = [...program.matchAll(/see "btrfs-backup help ([a-z-]+)"/g)].map(
    ([, one]) => one as string,
  );
  expect([...new Set(topics)].sort()).toEqual(["keys", "security", "stores", "without-root"]);
  for (const topic of topics) expect(chapters.map((one): string => one.topic)).toContain(topic);
  // Links between chapters lead somewhere, and each file stands in the contents.
  const files = readdirSync(MANUAL).filter((name) => name !== "README.md");
  expect(chapters.map(({ topic }) => `${topic}.md`).toSorted()).toEqual(files.toSorted());
  for (const { text } of chapters)
    for (const [, link = ""] of text.matchAll(/\]\((?!https?:)(.*?)\)/g))
      expect(files).toContain(link);
  const text = chapters.map((one) => one.text).join("\n");
  const told = ([name, { short }]: [string, Option]) =>
    text.includes(`--${name}`) ||
    (short !== undefined && new RegExp(`[\\s\`(]-${short}\\b`).test(text));
  const missing = [...OPTIONS].filter((one) => !told(one)).map(([name]) => name);
  expect(missing.toSorted()).toEqual(["help", "help-all", "latest-only"]);
});

test("a snapshot's name is never run, whatever whoever made it called it", async () => {
  const { source, destination } = pair();
  const directory = temporaryDirectory();
  const prefix = "$(touch run)`touch run`;touch run;'\"-";
  await expectRun(0, ["-p", prefix, source, destination]);
  const [name = ""] = snapshotNames(destination, prefix);
  for (const shell of ["bash", "zsh"] as const) {
    expect(await typed(shell, `restore ${destination} /target --snapshot `, directory)).toBe(
      `<restore><${destination}></target><--snapshot><${name}>`,
    );
    expect(await typed(shell, `keep ${destination} `, directory)).toBe(
      `<keep><${destination}><${name}>`,
    );
  }
  expect(offered(`restore ${destination} /target --snapshot `, directory)).toEqual([name]);
  expect(existsSync(join(directory, "run"))).toBe(false);
});

test("fish completes commands, options, choices, paths, and snapshots' names, the newest first", async () => {
  const { source, destination, name } = await backedUp();
  await nextSecond();
  await expectRun(0, [source, destination]);
  const names = [snapshotNames(destination)[1] as string, name];
  const directory = temporaryDirectory();
  mkdirSync(join(directory, "backups"));
  sh(`: >"$1/home.args"; : >"$1/letter"`, directory);
  expect(offered("rest")).toContain("restore");
  expect(offered("--num-sn")).toEqual(["--num-snapshots"]);
  expect(offered("restore --repl")).toEqual(["--replace"]);
  expect(offered("hel")).toContain("help");
  expect(offered("help ret")).toEqual(["retention"]);
  expect(offered("help guide ret")).toEqual([]);
  expect(offered("list --repl")).toEqual([]);
  expect(offered("-v ").toSorted()).toEqual(["debug", "error", "info", "warning"]);
  expect(offered("list back", directory)).toEqual(["backups/"]);
  expect(offered("versions let", directory)).toEqual(["letter"]);
  expect(offered("-q @ho", directory)).toEqual(["@home.args"]);
  expect(offered(`restore ${destination} /target --snapshot `)).toEqual(names);
  expect(
    offered(`restore raw://${destination} /target --snapshot=2`).map((one) =>
      one.replace("--snapshot=", ""),
    ),
  ).toEqual(names);
  expect(offered(`versions ${source}/some/file --get 2`)).toEqual(names);
  expect(offered(`release ${destination} 2`, temporaryDirectory())).toEqual(names);
});

test("every option of every command is completed, in each shell", () => {
  for (const { name: command, groups } of every) {
    const options = groups.flatMap(([, some]) => some.map(({ name }) => `--${name}`)).sort();
    expect(offered(`${command} --`).toSorted()).toEqual(options);
    const reply = sh(
      `set +u; source "$1"; COMP_WORDS=(btrfs-backup "$2" --) COMP_CWORD=2; _btrfs_backup; printf "%s\\n" "\${COMPREPLY[@]}"`,
      join(DIST, "btrfs-backup.bash"),
      command,
    );
    expect(reply.split("\n").toSorted()).toEqual(options);
  }
});
