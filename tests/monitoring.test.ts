// What watches over backups: the alert rules and the dashboard of scripts/, over metrics that real runs wrote.

import { expect, test } from "bun:test";
import { readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import {
  expectRun,
  filesystem,
  nextSecond,
  ROOT,
  sh,
  subvolume,
  temporaryDirectory,
} from "./support/rig.ts";

const RULES = join(ROOT, "scripts/btrfs-backup.rules.yml");
type Panel = { title: string; targets: { expr: string }[] };
const DASHBOARD: { panels: Panel[]; templating: { list: { query: { query?: string } }[] } } =
  JSON.parse(readFileSync(join(ROOT, "scripts/btrfs-backup.dashboard.json"), "utf8"));

/** What Grafana makes of a query where nothing is chosen. */
const asked = (query: string) => query.replace(/\$(instance|source)\b/g, ".*");
const queries = DASHBOARD.panels.flatMap(({ targets }) => targets.map(({ expr }) => asked(expr)));
/** The names of metrics in a query or in what a run wrote. */
const namesIn = (text: string) => new Set(text.match(/\bbtrfs_backup_\w+/g));

/** A file of metrics, and the day of the test on which it was written. */
type Written = { readonly day: number; readonly text: string };

/** The series that a scrape of these files every six hours gives, their times moved to their days. */
function seriesOf(files: readonly (readonly Written[])[], days: number) {
  const all = new Map<string, string[]>();
  for (const versions of files)
    for (let n = 0; n <= days * 4; n++) {
      const seen = versions.findLast(({ day }) => day * 4 <= n);
      if (seen === undefined) continue;
      const samples = [...seen.text.matchAll(/^(btrfs_backup_\w+)(?:\{(.*)\})? (\S+)$/gm)];
      const ended = Math.max(
        ...samples.flatMap(([, name, , value]) =>
          /_(run|drill)_timestamp/.test(name ?? "") ? [Number(value)] : [],
        ),
      );
      for (const [, name = "", labels = "", value] of samples) {
        const whole = ['instance="laptop:9100"', 'job="node"', ...(labels ? [labels] : [])];
        const series = `${name}{${whole.join(",")}}`;
        const isTime = name.endsWith("timestamp_seconds") && Number(value) > 0;
        const moved = isTime ? Number(value) - ended + seen.day * 86_400 : Number(value);
        const values = all.get(series) ?? [];
        while (values.length < n) values.push("_");
        values[n] = String(moved);
        all.set(series, values);
      }
    }
  return [...all].map(([series, values]) => ({ series, values: values.join(" ") }));
}

/** What a drill of a backup writes, with --metrics. */
async function drilled(destination: string): Promise<string> {
  const file = join(temporaryDirectory(), "drill.prom");
  await expectRun(0, ["drill", "-q", "--metrics", file, destination]);
  return readFileSync(file, "utf8");
}

test("the alert rules fire on what real runs wrote, and only then; each query of the dashboard gives something", async () => {
  const [a, small, large] = [
    filesystem(),
    filesystem({ size: "300M" }),
    filesystem({ size: "1G" }),
  ];
  const [home, srv] = [subvolume(join(a.path, "home")), subvolume(join(a.path, "srv"))];
  const [full, well] = [join(small.path, "home"), join(large.path, "srv")];
  const directory = temporaryDirectory();
  const file = join(directory, "home.prom");
  const ofAll = join(directory, "all.prom");
  writeFileSync(join(directory, "srv.args"), `${srv}\n${well}\n`);

  // A disk on which 30 MB of 300 are written a day, and one that is not there; a source that has all.
  const versions: { home: Written[]; all: Written[] } = { home: [], all: [] };
  for (let day = 1; day <= 5; day++) {
    sh(`head -c 30M /dev/urandom >"$1/$2"`, home, String(day));
    await expectRun(1, ["-q", "--metrics", file, home, full, "/nowhere/x"]);
    versions.home.push({ day, text: readFileSync(file, "utf8") });
    if (day === 5) writeFileSync(join(directory, "wrong.args"), "--nonsense\n");
    const all = ["all", "-q", "--config-dir", directory, "--metrics", ofAll];
    if (day !== 3) await expectRun(day === 5 ? 2 : 0, all);
    versions.all.push({ day, text: readFileSync(ofAll, "utf8") });
    await nextSecond();
  }
  // Later runs of home find the same; srv has no more.
  const latest = versions.home.at(-1) as Written;
  const days = 70;
  for (let day = 6; day <= days; day++) versions.home.push({ day, text: latest.text });
  const drills = [{ day: 1, text: await drilled(well) }];
  const series = seriesOf([versions.home, versions.all, drills], days);

  const firing = (
    day: number,
    ...alerts: [name: string, source?: string, destination?: string][]
  ) => ({
    expr: `count by (alertname, source, destination) (ALERTS{alertstate="firing"})`,
    eval_time: `${day * 24}h`,
    exp_samples: alerts.map(([alertname, source, destination]) => ({
      labels: `{${Object.entries({ alertname, source, destination })
        .flatMap(([key, value]) => (value === undefined ? [] : [`${key}=${JSON.stringify(value)}`]))
        .join(",")}}`,
      value: 1,
    })),
  });
  const away = "/nowhere/x";
  const always: Parameters<typeof firing>[1][] = [
    ["BtrfsBackupErrors", home, away],
    ["BtrfsBackupNeverWorked", home, away],
  ];
  const broken: (typeof always)[number] = ["BtrfsBackupBrokenFiles"];
  const old: typeof always = [
    ["BtrfsBackupTooOld", srv, well],
    ["BtrfsBackupNotRun", srv],
  ];
  const filling: (typeof always)[number] = ["BtrfsBackupDiskFull", home, full];
  const never: (typeof always)[number] = ["BtrfsBackupNeverDrilled", home, full];
  const undrilled: (typeof always)[number] = ["BtrfsBackupNoDrill", srv, well];
  const tests = {
    rule_files: [RULES],
    evaluation_interval: "6h",
    tests: [
      {
        interval: "6h",
        input_series: series,
        promql_expr_test: [
          firing(1, ["BtrfsBackupErrors", home, away]),
          firing(2, ...always),
          firing(3.75, ...always), // a trend of less than three days is none
          firing(5, ...always, broken, filling),
          firing(7, ...always, broken, filling),
          firing(7.25, ...always, broken, filling, ...old),
          firing(30, ...always, broken, ...old), // nothing came for two weeks
          firing(60, ...always, broken, ...old),
          firing(61, ...always, broken, ...old, never),
          firing(61.25, ...always, broken, ...old, never, undrilled),
          ...queries.map((query) => ({
            expr: `count(${query}) > bool 0`,
            eval_time: "120h",
            exp_samples: [{ labels: "{}", value: 1 }],
          })),
        ],
        alert_rule_test: [
          {
            eval_time: "48h",
            alertname: "BtrfsBackupNeverWorked",
            exp_alerts: [
              {
                exp_labels: {
                  severity: "critical",
                  instance: "laptop:9100",
                  job: "node",
                  source: home,
                  destination: away,
                },
                exp_annotations: {
                  summary: `laptop:9100: there is no backup of ${home}`,
                  description: `No run has brought ${away} all that it should have. What is wrong: btrfs-backup check`,
                },
              },
            ],
          },
        ],
      },
      {
        interval: "6h",
        input_series: [],
        promql_expr_test: [firing(0.75), firing(1.25, ["BtrfsBackupNoMetrics"])],
      },
    ],
  };
  const written = join(directory, "tests.json");
  writeFileSync(written, JSON.stringify(tests));
  expect(sh(`promtool check rules --lint=all --lint-fatal "$1" 2>&1`, RULES)).toContain("SUCCESS");
  expect(sh(`promtool test rules "$1" 2>&1 || :`, written)).toContain("SUCCESS");

  // Each metric is one that is written, and each that is written is looked at.
  const real = namesIn(series.map((one) => one.series).join("\n"));
  const inRules = namesIn(readFileSync(RULES, "utf8"));
  const variables = DASHBOARD.templating.list.map(({ query }) => query.query ?? "").join("\n");
  const onDashboard = namesIn([...queries, variables].join("\n"));
  for (const name of [...inRules, ...onDashboard]) expect(real).toContain(name);
  for (const name of real) expect(new Set([...inRules, ...onDashboard])).toContain(name);
  expect(queries.length).toBe(DASHBOARD.panels.length);
});
