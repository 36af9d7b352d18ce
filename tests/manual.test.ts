// The README and the manual, run from their own text. A block that is marked `run` is run word for word, as root of a machine that
// has /home and /srv on one btrfs filesystem, /backup and /mnt on two others, and an sshd that is called nas, server, laptop and web1;
// rclone's s3: is an S3 server. All of it is in a mount namespace of its own, with a root directory that is thrown away.
//
// - ```sh run: each command succeeds.
// - ```sh run server: the same on the other host, whose /backup is another disk.
// - ```console run: what stands behind "# " is a command, and what follows is all that it prints, but for times, sizes and the
//   names of snapshots. With MANUAL=write in the environment, what it prints is written into the file.
// - ```… file=FILE: what the file holds.
// - <!-- run: … -->: what happens between two blocks; readers do not see it. `night NAME SOURCE DEST…` is a run in an earlier night.
//
// Every other command of a block stands in UNTESTED with its reason.

import { expect, test } from "bun:test";
import { spawn, spawnSync } from "node:child_process";
import { readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join, relative } from "node:path";
import type { ArgsDef } from "citty";
import { COMMANDS, OPTIONS, readArguments } from "../btrfs-backup.ts";
import { gpgKey, ROOT, s3Server, sh, temporaryDirectory, waitFor } from "./support/rig.ts";

const FILES = [
  join(ROOT, "README.md"),
  ...readdirSync(join(ROOT, "scripts/manual")).map((name) => join(ROOT, "scripts/manual", name)),
];

/** Why commands are not run here, and what runs them instead. */
const REASONS: Readonly<Record<string, readonly string[]>> = {
  "packages.test.ts builds this project, as an ordinary user": [
    "scripts/build",
    "install dist/btrfs-backup /usr/local/sbin/",
  ],
  "packages.test.ts installs these files with the package": [
    "install -m 644 -D dist/btrfs-backup.8 -t /usr/local/share/man/man8/",
    "install -m 644 -D dist/btrfs-backup-guide.7 -t /usr/local/share/man/man7/",
    "install -m 644 -D dist/btrfs-backup.bash /usr/local/share/bash-completion/completions/btrfs-backup",
    "install -m 644 -D dist/_btrfs-backup -t /usr/local/share/zsh/site-functions/",
    "install -m 644 -D dist/btrfs-backup.fish -t /etc/fish/completions/",
  ],
  "no systemd runs in the tests: setup.test.ts has a stand-in, and systemd-analyze checks the units":
    [
      "install -m 644 scripts/btrfs-backup.service scripts/btrfs-backup.timer /etc/systemd/system/",
      "systemctl enable --now btrfs-backup.timer",
    ],
  "the tests' root directory is not on btrfs: recursive.test.ts, import.test.ts and run.test.ts run these options elsewhere":
    [
      "btrfs-backup --recursive -N 7 -n '14d+ 8w' / /backup/laptop --exclude 'var/lib/docker/**'",
      "btrfs-backup --recursive -N 7 -n '14d+ 8w 12m' / /backup/laptop/root --exclude 'var/lib/docker/**'",
      "btrfs-backup --recursive -N 7 -n '14d+ 8w 12m' / /backup/laptop/root --before-snapshot 'mkdir -p /var/backups && cp -aT /boot /var/backups/boot'",
      "btrfs-backup --recursive -N 7 -n '14d+ 8w 12m' / /backup/laptop/root --before-snapshot 'mkdir -p /var/backups && cp -rT /boot /var/backups/boot'",
      "btrfs-backup --recursive -N 7 -n '14d+ 8w 12m' / /backup/server",
      "btrfs-backup --import /.snapshots -f /.snapshots/btrfs-backup -n '14d+ 8w' / /backup/laptop/root",
      "btrfs-backup -N 7 -n '14d+ 8w' /var /backup/laptop/var",
      "btrfs-backup --recursive -N 7 -n '14d+ 8w' /var /backup/laptop/var",
    ],
  "they belong to lines that are not run; the same with other paths is run above": [
    "btrfs-backup -N 7 -n '14d+ 8w 12m' /home /backup/laptop/home",
    "btrfs-backup -N 7 -n '14d+ 8w 12m' /var/home /backup/laptop/home",
    "btrfs-backup -N '24h 7d' -n '14d+ 8w 12m' /home /backup/laptop/home",
    "btrfs-backup -N 7 -n '14d+ 8w' /srv /backup/laptop/srv",
  ],
  "the machine's /home is a mount, which mv does not rename": [
    "mv /home /home.old",
    "btrfs subvolume create /home",
    "cp -a --reflink=always /home.old/. /home/",
    "rm -r /home.old",
  ],
  "a disk of a rescue system: restore.test.ts restores into a top level, and over ssh": [
    "mkfs.btrfs -f /dev/sda2",
    "mount -o subvolid=5 /dev/sda2 /mnt",
    "btrfs-backup restore ssh://root@nas/backup/laptop/root /mnt/@",
    "btrfs-backup restore ssh://root@nas/backup/laptop/home /mnt/@home",
    "btrfs filesystem show /mnt",
    "grep -n UUID /mnt/@/etc/fstab",
    "umount /mnt",
  ],
  "a tree of an earlier day: tree.test.ts goes back to one": [
    "btrfs-backup restore --recursive --replace --before '2026-01-15 23:59' /srv /srv",
  ],
  "four machines: link.test.ts and together.test.ts run several at a time": [
    "printf '%s\\n' web1 web2 db mail | xargs -P 4 -I{} btrfs-backup --quiet -N 3 -n '14d+ 8w 12m' ssh://root@{}/home /backup/{}/home",
  ],
  "no Prometheus runs in the tests: monitoring.test.ts gives the rules to promtool": [
    "install -D -m 644 scripts/btrfs-backup.rules.yml /etc/prometheus/rules/btrfs-backup.rules.yml",
    "grep -A 3 '^rule_files:' /etc/prometheus/prometheus.yml",
    "promtool check rules /etc/prometheus/rules/btrfs-backup.rules.yml && systemctl reload prometheus",
  ],
  "it needs the Internet": [
    "apt install rclone gnupg zstd",
    "rclone config create s3 s3 provider=AWS region=eu-central-1 access_key_id=… secret_access_key=…",
    "btrfs-backup --quiet @/etc/btrfs-backup/home.args && curl -fsS -m 10 https://hc.example.org/PING-ID >/dev/null",
  ],
  "no server of NFS or SFTP is there: store.test.ts has rclone and folders of other filesystems": [
    "mount -t nfs nas:/volume1/backup /mnt/nas",
    "btrfs-backup /home --optional raw:///mnt/nas/home",
    "btrfs-backup /home rclone://nas-sftp:backup/home",
  ],
  "shell.test.ts sends to S3 by aws, and receives from there": [
    "btrfs-backup /home 'shell://gpg --batch --encrypt --recipient me@example.org | aws s3 cp --expected-size 200000000000 - s3://bucket/home/$BTRFS_BACKUP_NAME.btrfs.gpg'",
    "aws s3 cp s3://bucket/home/20260101-030000.btrfs.gpg - | gpg --decrypt | btrfs receive /mnt/target",
  ],
  "NAME stands for a name: store.test.ts receives a chain without the program": [
    "rclone cat s3:my-bucket/laptop/home/NAME | gpg --decrypt | zstd -d | btrfs receive /mnt",
  ],
  "sudo.test.ts runs it as an ordinary user": ["btrfs-backup --convert-rw -N '24h 7d' /home/ann"],
};
const UNTESTED = Object.values(REASONS).flat();

/** A block or a comment of a file, and where its text is. */
type Step = { readonly info: string; readonly text: string; readonly at: number };

const stepsIn = (markdown: string): Step[] =>
  [...markdown.matchAll(/^```(.*)\n([^]*?)^```$|^<!-- run: ([^]*?) -->$/gm)].map((match) => {
    const [whole, info = "hidden run", text = "", hidden = ""] = match;
    const own = info === "hidden run" ? hidden : text;
    return { info, text: own, at: match.index + whole.indexOf(own) };
  });
const isRun = ({ info }: Step) => / run\b/.test(info);

/** The commands of a transcript, each with what it prints. */
const transcript = (text: string) =>
  text
    .split(/^# /m)
    .slice(1)
    .map((piece) => {
      const end = piece.indexOf("\n");
      return { command: piece.slice(0, end), output: piece.slice(end + 1) };
    });

/** The commands of a block that is not run: lines, without what a comment says of them. */
const commandsIn = ({ info, text }: Step): string[] => {
  if (info.startsWith("console")) return transcript(text).map(({ command }) => command);
  if (!/^sh\b/.test(info)) return [];
  return text
    .replaceAll(/\s*\\\n\s*/g, " ")
    .split("\n")
    .map((line) => line.replace(/\s+#\s.*$/, "").trim())
    .filter((line) => line !== "" && !line.startsWith("#"));
};

/** What a command prints, without what is another one each time. */
function comparable(text: string): string {
  const names = new Map<string, string>();
  const named = (name: string) =>
    names.get(name) ?? (names.set(name, `NAME${names.size + 1}`).get(name) as string);
  return text
    .replaceAll(/\d{8}-\d{6}/g, named)
    .replaceAll(/[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}/g, "UUID")
    .replaceAll(/\d{4}-\d\d-\d\d \d\d:\d\d(:\d\d)?/g, "TIME")
    .replaceAll(/\b[\d.]+[BKMGT](\/s)?(?!\w)/g, "SIZE")
    .replaceAll(/\b[\d.]+ (ms|s|seconds?|minutes?|hours?|days?|weeks?|months?|years?)\b/g, "AGE")
    .replaceAll(/\bLinux .*/g, "TOOLS")
    .replaceAll(/\bloop\d+\b/g, "DISK")
    .replaceAll(/[ \t]+/g, " ")
    .replaceAll(/ $/gm, "");
}

/** The machine that the manual is written for. $W is a new directory. */
const MACHINE = `
mount -t tmpfs none "$W"; cd "$W"; mkdir up work root images
mount -t overlay overlay -o "lowerdir=/,upperdir=$W/up,workdir=$W/work" root
for directory in proc sys dev; do mount --rbind "/$directory" "root/$directory"; done
for directory in run tmp var/tmp root etc/btrfs-backup home backup mnt srv; do mkdir -p "root/$directory"; mount -t tmpfs -o mode=755 none "root/$directory"; done
mkdir -p root/run/sshd root/.old
for image in a b c d; do truncate -s 100G "images/$image"; mkfs.btrfs -q "images/$image" >/dev/null; done
mkdir top; mount -o loop,noatime images/a top
for name in home srv; do btrfs -q subvolume create "top/@$name" >/dev/null; umount "root/$name"; mount -o "noatime,subvol=@$name" "$(findmnt -no SOURCE top)" "root/$name"; done
umount top root/backup root/mnt
mount -o loop,noatime images/b root/backup
mount -o loop,noatime images/c root/mnt
mkdir -p root/media/nas; mount -o loop,noatime images/d root/media/nas
install -D "$ROOT/dist/btrfs-backup" root/usr/local/sbin/btrfs-backup
cp -R "$GNUPGHOME" root/root/.gnupg; rm -f root/root/.gnupg/S.*
mkdir -p -m 700 root/root/.ssh root/root/.config/rclone
printf '[s3]\\ntype = s3\\nprovider = Other\\nenv_auth = false\\naccess_key_id = S3RVER\\nsecret_access_key = S3RVER\\nendpoint = %s\\nforce_path_style = true\\n' "$ENDPOINT" >root/root/.config/rclone/rclone.conf
cd root/root/.ssh; ssh-keygen -q -t ed25519 -N "" -f host; ssh-keygen -q -t ed25519 -N "" -f id_ed25519; cp id_ed25519.pub authorized_keys; cp id_ed25519 backup
echo "nas,[nas]:2222,server,laptop,web1,office $(cat host.pub)" >known_hosts
printf 'Port 22\\nPort 2222\\nListenAddress 127.0.0.2\\nHostKey /root/.ssh/host\\nPermitRootLogin yes\\nStrictModes no\\nUsePAM no\\nPidFile none\\n' >sshd_config
cd "$W/root"
rm -f etc/hosts; printf '127.0.0.1 localhost\\n127.0.0.2 nas server laptop web1 office\\n' >etc/hosts
pivot_root . .old; umount -l /.old
hostname laptop
cat >/usr/local/sbin/night <<'EOF'
set -e
name=$1 source=$2; shift 2
mkdir -p -m 700 "$source/snapshot"
btrfs -q subvolume snapshot -r "$source" "$source/snapshot/$name" >/dev/null
btrfs-backup -q -S "$source" "$@"
EOF
chmod +x /usr/local/sbin/night
cat >/etc/fstab <<EOF
$(findmnt -vno SOURCE /home) /home btrfs noatime,subvol=@home 0 0
$(findmnt -vno SOURCE /srv) /srv btrfs noatime,subvol=@srv 0 0
$(findmnt -vno SOURCE /backup) /backup btrfs noatime 0 0
EOF
mkdir -p /home/ann/letters /volume1/backup /mnt/usb /mnt/disk
btrfs -q subvolume create /srv/data >/dev/null
seq 100000 >/home/ann/thesis.odt; echo "Dear Bob," >/home/ann/letters/bob; head -c 3000000 /dev/urandom >/home/ann/photo.jpg
btrfs -q subvolume create /srv/data/cache >/dev/null; echo one >/srv/data/table
sync -f /home
unshare --mount sh -ec "mount --bind /media/nas /backup; exec /usr/sbin/sshd -D -f /root/.ssh/sshd_config" &
echo $! >/run/sshd.pid
exec sleep infinity
`;

const gpg = gpgKey();
sh(
  `GNUPGHOME="$1" gpg --batch --quiet --quick-add-uid "$2" me@example.org`,
  gpg.env["GNUPGHOME"] ?? "",
  gpg.recipient,
);

/** A fresh machine; `run` runs bash on it. */
async function machine(needsS3: boolean) {
  const env = {
    PATH: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    HOME: "/root",
    USER: "root",
    LC_ALL: "C.UTF-8",
    TERM: "dumb",
  };
  const { endpoint } = needsS3 ? await s3Server("my-bucket") : { endpoint: "" };
  const settings = { W: temporaryDirectory(), ROOT, ENDPOINT: endpoint, ...gpg.env };
  const child = spawn(
    "unshare",
    ["--mount", "--uts", "--propagation", "private", "bash", "-euc", MACHINE],
    { env: { ...env, ...settings }, stdio: ["ignore", "inherit", "inherit"] },
  );
  const run = (script: string) => {
    const all = ["--target", String(child.pid), "--mount", "--uts"];
    const { status, stdout } = spawnSync(
      "nsenter",
      [...all, "bash", "-c", `cd /root; { ${script}\n} 2>&1`],
      {
        env,
        encoding: "utf8",
        maxBuffer: 1 << 26,
      },
    );
    return { status, output: stdout };
  };
  await waitFor("the machine", () => run("ssh nas true").status === 0);
  return {
    run,
    end: () => {
      run("kill $(cat /run/sshd.pid)");
      child.kill("SIGKILL");
    },
  };
}

for (const file of FILES) {
  const markdown = readFileSync(file, "utf8");
  const steps = stepsIn(markdown);
  if (!steps.some(isRun)) continue;
  test(`what ${relative(ROOT, file)} shows is what happens`, async () => {
    const { run, end } = await machine(markdown.includes("s3:my-bucket"));
    const written: { from: number; to: number; text: string }[] = [];
    try {
      for (const { info, text, at } of steps) {
        const path = / file=(\S+)/.exec(info)?.[1];
        if (path !== undefined) {
          const { output } = run(`cat >${path} <<'EOF'\n${text}EOF`);
          expect(output).toBe("");
        } else if (info.startsWith("console run")) {
          const real = transcript(text).map(({ command }) => {
            const { output } = run(command);
            return { command, output };
          });
          const whole = real
            .map(({ command, output }) => `# ${command}\n${output.trimEnd()}\n`)
            .join("");
          if (process.env["MANUAL"] === "write")
            written.unshift({ from: at, to: at + text.length, text: whole });
          else expect(comparable(whole)).toBe(comparable(text));
        } else if (/ run\b/.test(info)) {
          const isServers = / run server\b/.test(info);
          const script = `set -eo pipefail; PATH=/usr/local/sbin:$PATH\n${text}`;
          const { status, output } = run(
            isServers ? `ssh server bash -s <<'EOF'\n${script}\nEOF` : script,
          );
          if (status !== 0) throw new Error(`exit ${status}:\n${text}\n${output}`);
        }
      }
    } finally {
      end();
    }
    let changed = markdown;
    for (const { from, to, text } of written)
      changed = changed.slice(0, from) + text + changed.slice(to);
    if (changed !== markdown) writeFileSync(file, changed);
  });
}

test("every other command is listed with its reason, and no reason is left over", () => {
  const others = FILES.flatMap((file) =>
    stepsIn(readFileSync(file, "utf8"))
      .filter((step) => !isRun(step) && !/ file=/.test(step.info))
      .flatMap(commandsIn),
  );
  expect(others.filter((command) => !UNTESTED.includes(command))).toEqual([]);
  expect(UNTESTED.filter((command) => !others.includes(command))).toEqual([]);
});

test("each message that the chapter of failures explains stands in the program", () => {
  const lines = readFileSync(join(ROOT, "btrfs-backup.ts"), "utf8")
    .split("\n")
    .filter((line) => !/^\s*(\/\/|\/\*\*|\* )/.test(line));
  const chapter = readFileSync(join(ROOT, "scripts/manual/failures.md"), "utf8");
  const messages = [...chapter.matchAll(/^\| (`.*?`) \| /gm)].flatMap(([, cell = ""]) =>
    [...cell.matchAll(/`([^`]+)`/g)].map(([, message = ""]) => message),
  );
  expect(messages.length).toBeGreaterThan(40);
  // An ellipsis stands for what is another text each time.
  const isThere = (message: string) => {
    const shape = message
      .split("…")
      .map((words) => words.replaceAll(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    return lines.some((line) => new RegExp(shape.join(".*")).test(line));
  };
  expect(messages.filter((message) => !isThere(message))).toEqual([]);
});

/** Options of other programs, beginnings of ours, and a word for any of them. */
const FOREIGN: readonly string[] = ["--expected-size", "--num-snap", "--option"];

test("each command within a sentence or a table makes sense to the program, and each option is there", () => {
  const wrong: string[] = [];
  for (const file of FILES) {
    const prose = readFileSync(file, "utf8").replaceAll(/^```[^]*?^```$/gm, "");
    for (const [, code = ""] of prose.matchAll(/`([^`\n]+)`/g)) {
      const option = /^--([a-z-]+)/.exec(code)?.[1];
      if (option !== undefined && !OPTIONS.has(option) && !FOREIGN.includes(`--${option}`))
        wrong.push(code);
      const [first, ...words] = (code.match(/(?:'[^']*'|\S)+/g) ?? []).map((word) =>
        word.replaceAll("'", ""),
      );
      const isWhole = first === "btrfs-backup" && words.length > 0 && !code.includes("…");
      if (!isWhole || words[0] === "help" || words.includes("COMMAND")) continue;
      const isNamed = Object.hasOwn(COMMANDS, words[0] ?? "");
      const { args } = COMMANDS[(isNamed ? words[0] : "run") as keyof typeof COMMANDS];
      try {
        readArguments(isNamed ? words.slice(1) : words, args as ArgsDef);
      } catch (error) {
        wrong.push(`${code}: ${(error as Error).message}`);
      }
    }
  }
  expect(wrong).toEqual([]);
});

test("the README is one that is read from top to bottom, and says how large the program is", () => {
  const readme = readFileSync(join(ROOT, "README.md"), "utf8");
  expect(readme.trimEnd().split("\n").length).toBeLessThanOrEqual(250);
  expect(readme.split(/\s+/).length).toBeLessThanOrEqual(3300);
  const { size } = statSync(join(ROOT, "btrfs-backup.ts"));
  for (const text of [readme, readFileSync(join(ROOT, "scripts/manual/comparison.md"), "utf8")]) {
    const told = Number(/ (\d+) KB in one file/.exec(text)?.[1]);
    expect([told, Math.abs(size / 1000 / told - 1) < 0.05]).toEqual([told, true]);
  }
});
