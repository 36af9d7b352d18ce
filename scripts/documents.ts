// Writes into a directory what comes from the program's own definitions and from the chapters in scripts/manual: two man pages,
// and completions for bash, zsh and fish.

import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  blocksOf,
  chaptersOf,
  COMMANDS,
  ENVIRONMENT,
  EXAMPLES,
  EXIT_STATUS,
  LEVELS,
  manualOf,
  stretchesOf,
  VERSION,
  type Block,
  type Chapter,
  type ToldArgument,
} from "../btrfs-backup.ts";

const commands = Object.entries(COMMANDS).map(([name, command]) => ({
  name,
  ...manualOf(command),
}));
const optionsOf = ({ groups }: (typeof commands)[number]) =>
  groups.flatMap(([, options]) => options);

// ── The man page ─────────────────────────────────────────────────────────────────────────

const roff = (text: string) =>
  text
    .replaceAll("\\", "\\e")
    .replaceAll("-", "\\-")
    .replaceAll("…", "\\|.\\|.\\|.")
    .replaceAll("→", "\\(->")
    .replaceAll("~", "\\(ti")
    .replaceAll("^", "\\(ha")
    .replaceAll("–", "\\(en")
    .replaceAll("'", "\\(aq")
    .replace(/^\./gm, "\\&.");
const bold = (text: string) => `\\fB${roff(text)}\\fR`;
const item = (term: string, text: string) => `.TP\n${term}\n${roff(text)}\n`;
const spelled = ({ name, short, hint }: ToldArgument) =>
  `${short === null ? "" : `${bold(`-${short}`)}, `}${bold(`--${name}`)}${hint === null ? "" : ` \\fI${roff(hint)}\\fR`}`;
const items = (all: readonly ToldArgument[]) =>
  all.map((option) => item(spelled(option), option.description)).join("");
const positionals = (all: readonly ToldArgument[]) =>
  all.map(({ name, description }) => item(`\\fI${name.toUpperCase()}\\fR`, description)).join("");
const synopsis = (usage: string) =>
  usage.replace(
    /^(btrfs-backup(?: [a-z]+)?) (.*)$/,
    (_, name: string, rest: string) =>
      `.B ${roff(name)}\n.RI ${rest
        .split(" ")
        .map((word) => `"${roff(word)}"`)
        .join(' " " ')}\n`,
  );
const [run, ...others] = commands as [(typeof commands)[number], ...typeof commands];
/** Whether a command has just this option: one of that name can mean something else. */
const has = (command: (typeof commands)[number], { name, description }: ToldArgument) =>
  optionsOf(command).some((one) => one.name === name && one.description === description);

/** Commands and paths are not broken at hyphens, nor pulled apart to a straight right margin. */
const RAGGED = ".nh\n.nr HY 0\n.ad l\n";

const FILES = {
  ".btrfs-backup.json":
    "Beside snapshots and backups: to whom they belong, what destinations still need, and what is kept by hand.",
  ".btrfs-backup.PREFIX.lock": "The lock of a folder and prefix.",
  "/etc/btrfs-backup/NAME.args":
    "Arguments of one source's runs: all of them are run by all and btrfs-backup.service, one by btrfs-backup@NAME.service.",
};
const list = (entries: Readonly<Record<string, string>>) =>
  Object.entries(entries)
    .map(([term, text]) => item(bold(term), text))
    .join("");

// ── Chapters of the manual ───────────────────────────────────────────────────────────────

const MANUAL = join(import.meta.dir, "manual");
const chapters = chaptersOf(
  new Map(readdirSync(MANUAL).map((name) => [name, readFileSync(join(MANUAL, name), "utf8")])),
);
const inPart = (part: Chapter["part"]) => chapters.filter((chapter) => chapter.part === part);
/** What `help` takes. */
const topics = [
  "guide",
  ...chapters.map(({ topic }) => topic),
  ...commands.map(({ name }) => name),
].join(" ");
const HELP = "Print the manual, or a chapter of it";

/** A text with its strong words and its commands in bold. A line of roff does not begin with a blank. */
const worded = (text: string) =>
  stretchesOf(text)
    .map((one) => (one.look === "plain" ? roff(one.text) : bold(one.text)))
    .join("");
const literal = (text: string) => `.PP\n.in +4n\n.EX\n${roff(text.trimEnd())}\n.EE\n.in\n`;

/** A block in roff. A table is a paragraph for each row, with the row's first cell before it. */
function block(one: Block, follows: boolean): string {
  if (one.kind === "heading") return `.SS ${worded(one.text)}\n`;
  if (one.kind === "paragraph") return `.PP\n${worded(one.text)}\n`;
  if (one.kind === "code") return literal(one.text);
  if (one.kind === "item")
    return `${follows ? "" : ".PP\n"}.IP ${one.mark === "-" ? "\\(bu" : roff(one.mark)} 4\n${worded(one.text)}\n`;
  const [head = [], ...rows] = one.rows;
  return rows
    .map(([first = "", ...cells]) => {
      const label = (i: number) => (cells.length === 1 ? "" : `${worded(head[i + 1] ?? "")}: `);
      return `.TP\n${worded(first) || "\\&"}\n${cells.map((cell, i) => `${label(i)}${worded(cell)}`).join("\n.br\n")}\n`;
    })
    .join("");
}

function chapter({ title, text }: Chapter): string {
  const blocks = blocksOf(text);
  const all = blocks.map((one, i) =>
    block(one, one.kind === "item" && blocks[i - 1]?.kind === "item"),
  );
  return `.SH ${roff(title.toUpperCase())}\n${all.join("")}`;
}

const guide =
  () => `.TH BTRFS\\-BACKUP\\-GUIDE 7 "" "btrfs\\-backup ${VERSION}" "Miscellaneous Information"
${RAGGED}.SH NAME
btrfs\\-backup\\-guide \\- how to back up btrfs subvolumes, and to get them back
.SH DESCRIPTION
${roff('The options are told in btrfs-backup(8). "btrfs-backup help TOPIC" prints a chapter:')}
${inPart("guide")
  .map(({ topic, title }) => `.TP\n${bold(topic)}\n${roff(title)}\n`)
  .join("")}${inPart("guide").map(chapter).join("")}.SH SEE ALSO
.BR btrfs\\-backup (8)
`;

const manual = () => `.TH BTRFS\\-BACKUP 8 "" "btrfs\\-backup ${VERSION}" "System Administration"
${RAGGED}.SH NAME
btrfs\\-backup \\- incremental backups of btrfs subvolumes
.SH SYNOPSIS
${commands.map(({ usage }) => synopsis(usage)).join(".br\n")}.SH DESCRIPTION
${roff("Takes a read-only snapshot of SOURCE, sends to each DEST what changed since the last one that it has, and deletes on both sides what the policies do not keep. Every backup on btrfs is a complete copy that can be browsed. Backups are recognised by UUIDs; a transfer that broke is never taken for a backup.")}
.PP
${roff("An argument @FILE stands for the arguments in FILE: one option with its value, or one location, a line; lines that begin with # are comments.")}
.SH ARGUMENTS
${positionals(run.positionals)}.SH OPTIONS
${run.groups.map(([title, options]) => `.SS "${roff(title)}"\n${items(options)}`).join("")}.SH OTHER COMMANDS
${roff("Options that they share with run mean the same; those of their own are told in full.")}
${others.map((command) => `.SS "${roff(command.name)}"\n${roff(command.description)}\n${positionals(command.positionals)}${items(optionsOf(command).filter((option) => !has(run, option)))}${shared(command)}`).join("")}.SH RETENTION
${roff("A POLICY is a number of the newest to keep, or words: 24h 7d 4w 12m 10y keep the first of each of so many hours, days, weeks, months and years; 14d+ keeps all of 14 days; * stands for all. What a destination still needs is never deleted at the source.")}
${inPart("reference").map(chapter).join("")}.SH EXIT STATUS
${list(EXIT_STATUS)}.SH ENVIRONMENT
${list(ENVIRONMENT)}.SH FILES
${list(FILES)}.SH EXAMPLES
${Object.values(EXAMPLES)
  .flatMap((examples) => Object.entries(examples))
  .map(([line, text]) => `${roff(`${text}:`)}\n.PP\n.in +4n\n.EX\n${roff(line)}\n.EE\n.in\n.PP\n`)
  .join("")}.SH SEE ALSO
.BR btrfs\\-backup\\-guide (7),
${["btrfs-subvolume", "btrfs-send", "btrfs-receive", "ssh", "rclone", "gpg"].map((name) => `.BR ${roff(name)} (${name.startsWith("btrfs") ? 8 : 1})`).join(",\n")}
`;

/** Which of the options of `run` another command understands. */
function shared(command: (typeof commands)[number]): string {
  const names = optionsOf(command)
    .filter((option) => has(run, option))
    .map(({ name }) => bold(`--${name}`));
  return names.length === 0 ? "" : `.PP\nAs for run: ${names.join(", ")}\n`;
}

// ── Completions ──────────────────────────────────────────────────────────────────────────

const CHOICES: Readonly<Record<string, readonly string[]>> = {
  LEVEL: Object.keys(LEVELS),
  "zstd[:LEVEL]": ["zstd"],
  "1|2": ["1", "2"],
};

/** What the value of an option is. */
type Kind = "snapshot" | "directory" | "file" | "choice" | "other";
function kindOf({ name, hint }: ToldArgument): Kind {
  if (name === "snapshot" || name === "get") return "snapshot";
  return (
    ({ DIR: "directory", DEST: "directory", PATH: "file", FILE: "file" }[hint ?? ""] as
      Kind | undefined) ?? (Object.hasOwn(CHOICES, hint ?? "") ? "choice" : "other")
  );
}
/** Commands that take the name of a snapshot behind its place. */
const naming = commands
  .filter(({ positionals: all }) => all.some(({ name }) => name === "name"))
  .map(({ name }) => name);
const choicesOf = ({ hint }: ToldArgument) => CHOICES[hint ?? ""] ?? [];

/** All options that take a value, each once: those of the same name mean the same. */
const valued = [
  ...new Map(
    commands
      .flatMap(optionsOf)
      .filter(({ hint }) => hint !== null)
      .map((option) => [option.name, option]),
  ).values(),
];
const spellings = ({ name, short }: ToldArgument) => [
  `--${name}`,
  ...(short === null ? [] : [`-${short}`]),
];

/**
 * Prints the names of snapshots, the newest first, that stand in the local locations among the words of a command line: in
 * the location itself, or in its snapshot folder; a path that `versions` gets is somewhere below its source. POSIX sh, without quotes of the kind '.
 */
const SNAPSHOTS = `command=$1 folder=snapshot before=
shift
for word; do
  case $before in -f | --snapshot-folder) folder=$word ;; esac
  case $word in --snapshot-folder=*) folder=\${word#*=} ;; esac
  before=$word
done
for word; do
  word=\${word#raw://}
  case $word in "~/"*) word=$HOME/\${word#"~/"} ;; /*) ;; "" | -*) continue ;; *) word=$PWD/$word ;; esac
  while :; do
    case $folder in /*) ls -1 "$folder" ;; *) ls -1 "$word" "$word/$folder" ;; esac
    case $command:$word in versions:*/*) word=\${word%/*} ;; *) break ;; esac
  done
done 2>/dev/null | sed -nE "s/^(.*[0-9]{8}-[0-9]{6})([+-][0-9]{4}_.*)?$/\\1/p" | sort -ru`;

const bash = () => `# bash completion of btrfs-backup

_btrfs_backup_snapshots() { sh -c '${SNAPSHOTS}' sh "$@"; }

_btrfs_backup() {
  local command=run options current=\${COMP_WORDS[COMP_CWORD]} before=\${COMP_WORDS[COMP_CWORD - 1]} IFS=$' \\t\\n'
  case \${COMP_WORDS[1]} in
  ${others.map(({ name }) => name).join(" | ")}) [ "$COMP_CWORD" = 1 ] || command=\${COMP_WORDS[1]} ;;
  esac
  # readline takes --option=value for three words, and @file for two, of which it replaces both
  if [ "$current" = = ]; then current=; elif [ "$before" = = ]; then before=\${COMP_WORDS[COMP_CWORD - 2]}; fi
  COMPREPLY=()
  if [ "\${COMP_WORDS[1]}" = help ] && [ "$COMP_CWORD" != 1 ]; then
    [ "$COMP_CWORD" != 2 ] || mapfile -t COMPREPLY < <(compgen -W "${topics}" -- "$current")
    return
  fi
  case $before in
  @) compopt -o filenames; mapfile -t COMPREPLY < <(compgen -P @ -f -- "$current"); return ;;
${groupedBy((option) => `${kindOf(option)} ${choicesOf(option).join(" ")}`.trim())
  .map(([kind, some]) => `  ${some.flatMap(spellings).join(" | ")}) ${bashValue(kind)}; return ;;`)
  .join("\n")}
  esac
  case $current in
  -*)
    case $command in
${commands.map((command) => `    ${command.name}) options="${optionsOf(command).flatMap(spellings).join(" ")}" ;;`).join("\n")}
    esac
    mapfile -t COMPREPLY < <(compgen -W "$options" -- "$current")
    ;;
  @) mapfile -t COMPREPLY < <(compgen -P @ -f) ;;
  *)
    case $command in ${naming.join(" | ")}) ${bashValue("snapshot")}; [ "\${#COMPREPLY[@]}" = 0 ] || return ;; esac
    compopt -o filenames
    case $command in versions) mapfile -t COMPREPLY < <(compgen -f -- "$current") ;; guard) ;; *) mapfile -t COMPREPLY < <(compgen -d -- "$current") ;; esac
    [ "$COMP_CWORD" = 1 ] && mapfile -t -O "\${#COMPREPLY[@]}" COMPREPLY < <(compgen -W "${commands.map(({ name }) => name).join(" ")} help" -- "$current")
    ;;
  esac
}
complete -o nosort -F _btrfs_backup btrfs-backup
`;
const groupedBy = (keyOf: (option: ToldArgument) => string) =>
  [...new Set(valued.map(keyOf))].map((key): [string, ToldArgument[]] => [
    key,
    valued.filter((option) => keyOf(option) === key),
  ]);
function bashValue(key: string): string {
  const [kind, ...choices] = key.split(" ");
  const reply = (from: string) => `mapfile -t COMPREPLY < <(${from})`;
  if (kind === "choice") return reply(`compgen -W "${choices.join(" ")}" -- "$current"`);
  // Whoever may add backups chooses their names: compgen -W would expand them, and the shell what is inserted unquoted.
  if (kind === "snapshot")
    return reply(
      `_btrfs_backup_snapshots "$command" "\${COMP_WORDS[@]:2}" | while IFS= read -r name; do name=$(printf %q "$name"); [[ $name != "$current"* ]] || echo "$name"; done`,
    );
  if (kind === "other") return ":";
  return `compopt -o filenames; ${reply(`compgen ${kind === "file" ? "-f" : "-d"} -- "$current"`)}`;
}

const zshText = (text: string) => text.replace(/[[\]:\\]/g, "\\$&").replaceAll("'", "'\\''");
function zshValue(option: ToldArgument): string {
  const { hint } = option;
  if (hint === null) return "";
  const kind = kindOf(option);
  const action = {
    snapshot: "_btrfs_backup_snapshots",
    directory: "_directories",
    file: "_files",
    choice: `(${choicesOf(option).join(" ")})`,
    other: " ",
  }[kind];
  return `:${zshText(hint)}:${action}`;
}
function zshOption(option: ToldArgument): string {
  const { short, hint, description, repeatable } = option;
  const [long, brief] = spellings(option) as [string, string?];
  const rest = `'[${zshText(description)}]${zshValue(option)}'`;
  const written = [
    `${long}${hint === null ? "" : "="}`,
    ...(brief === undefined ? [] : [`${brief}${hint === null ? "" : "+"}`]),
  ];
  const other = repeatable ? "'*'" : short === null ? "" : `'(${long} ${brief})'`;
  return `${other}${written.length === 1 ? written[0] : `{${written.join(",")}}`}${rest}`;
}
function zshPlaces(command: string): string {
  if (naming.includes(command)) return "_btrfs_backup_named";
  return `_btrfs_backup_places ${command === "versions" ? "_files" : "_directories"}`;
}
const zsh = () => `#compdef btrfs-backup
# zsh completion of btrfs-backup

_btrfs_backup_snapshots() {
  local -a names=(\${(f)"$(sh -c '${SNAPSHOTS}' sh "$command" "\${(@Q)words[2,-1]}")"})
  _wanted -V snapshots expl snapshot compadd -a names
}

_btrfs_backup_places() {
  [[ $PREFIX == @* ]] && { compset -P @; _files; return }
  compset -P 'raw://'
  $1
}

_btrfs_backup_named() {
  (( CURRENT < 3 )) || _btrfs_backup_snapshots
  _btrfs_backup_places _directories
}

_btrfs_backup() {
  local command=run
  local -a commands=(
${commands.map(({ name, description }) => `    '${name}:${zshText(description)}'`).join("\n")}
    'help:${HELP}'
  )
  if (( CURRENT == 2 )); then
    [[ $PREFIX == -* ]] || _describe -t commands command commands
  elif [[ -n \${(M)commands:#\${words[2]}:*} ]]; then
    command=$words[2]
    shift words
    (( CURRENT-- ))
  fi
  case $command in
  help) _arguments '1:topic:(${topics})' ;;
${commands
  .map(
    (command) => `  ${command.name})
    _arguments -s \\
${optionsOf(command)
  .map((option) => `      ${zshOption(option)}`)
  .join(
    " \\\n",
  )}${command.positionals.length === 0 ? "" : ` \\\n      '*:${command.positionals.map(({ name }) => name.toUpperCase()).join(" or ")}: ${zshPlaces(command.name)}'`}
    ;;`,
  )
  .join("\n")}
  esac
}

_btrfs_backup "$@"
`;

const fishText = (text: string) => `'${text.replace(/[\\']/g, "\\$&")}'`;
function fishOption(option: ToldArgument): string {
  const { name, short, hint, description } = option;
  const used = commands.filter((command) => has(command, option)).map((command) => command.name);
  const value =
    hint === null
      ? ""
      : {
          snapshot: " -x -k -a '(__btrfs_backup_snapshots)'",
          directory: " -x -a '(__fish_complete_directories (commandline -ct))'",
          file: " -r -F",
          choice: ` -x -a ${fishText(choicesOf(option).join(" "))}`,
          other: " -x",
        }[kindOf(option)];
  return `complete -c btrfs-backup -n ${fishText(`__btrfs_backup_is ${used.join(" ")}`)}${short === null ? "" : ` -s ${short}`} -l ${name}${value} -d ${fishText(description)}`;
}
const everyOption = [
  ...new Map(
    commands.flatMap(optionsOf).map((option) => [`${option.name} ${option.description}`, option]),
  ).values(),
];
const fish = () => `# fish completion of btrfs-backup

function __btrfs_backup_is -d 'Whether the command line is that of one of these commands'
    set -l words (commandline -opc)
    set -l command run
    contains -- "$words[2]" ${commands.map(({ name }) => name).join(" ")} help; and set command $words[2]
    contains -- $command $argv
end

function __btrfs_backup_snapshots
    set -l words (commandline -opc)
    sh -c ${fishText(SNAPSHOTS)} sh $words[2..]
end

complete -c btrfs-backup -f
${commands.map(({ name, description }) => `complete -c btrfs-backup -n 'test (count (commandline -opc)) = 1' -a ${name} -d ${fishText(description)}`).join("\n")}
complete -c btrfs-backup -n 'test (count (commandline -opc)) = 1' -a help -d '${HELP}'
complete -c btrfs-backup -n '__btrfs_backup_is help; and test (count (commandline -opc)) = 2' -a '${topics}'
complete -c btrfs-backup -n '__btrfs_backup_is ${commands
  .filter(({ name }) => name !== "guard" && name !== "versions")
  .map(({ name }) => name)
  .join(" ")}' -a '(__fish_complete_directories (commandline -ct))'
complete -c btrfs-backup -n '__btrfs_backup_is ${naming.join(" ")}' -k -a '(__btrfs_backup_snapshots)'
complete -c btrfs-backup -n '__btrfs_backup_is versions' -F
complete -c btrfs-backup -n 'string match -q "@*" -- (commandline -ct)' -a '@(__fish_complete_suffix (string sub -s 2 -- (commandline -ct)) "")'
${everyOption.map(fishOption).join("\n")}
`;

const [directory = "."] = process.argv.slice(2);
for (const [name, text] of Object.entries({
  "btrfs-backup.8": manual(),
  "btrfs-backup-guide.7": guide(),
  "btrfs-backup.bash": bash(),
  "_btrfs-backup": zsh(),
  "btrfs-backup.fish": fish(),
}))
  writeFileSync(join(directory, name), text);
