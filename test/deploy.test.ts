// What is in deploy/ against a real server: names, labels, command lines.

import { execFileSync, spawnSync } from "node:child_process";
import { once } from "node:events";
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { PrefixCache, Server } from "../ts/index.js";

const root = fileURLToPath(new URL("..", import.meta.url));
const main = join(root, "dist", "cli", "main.js");
const deploy = (file: string) => readFileSync(join(root, "deploy", file), "utf8");
const home = mkdtempSync(join(tmpdir(), "kvferry-deploy-"));
afterAll(() => rmSync(home, { recursive: true, force: true }));

/** Of Prometheus itself. */
const ADDED = ["instance", "job", "le"];

function tool(name: string, what: string): string | undefined {
	try {
		return execFileSync("which", [name], { encoding: "utf8", stdio: "pipe" }).trim();
	} catch {
		process.stderr.write(`SKIPPED ${what}: there is no ${name}\n`);
		return undefined;
	}
}

/** An expression with what its words say of labels: `{{tier}}`, `{{ $labels.tier }}`. */
interface Used {
	readonly expr: string;
	readonly words: string;
}

function alerts(): Used[] {
	return deploy("alerts.yml")
		.split("- alert: ")
		.slice(1)
		.map((rule) => ({
			expr: /^ +expr: (.*)$/m.exec(rule)?.[1] ?? "",
			words: /^ +summary: (.*)$/m.exec(rule)?.[1] ?? "",
		}));
}

function dashboard(): Used[] {
	const { panels } = JSON.parse(deploy("grafana-dashboard.json"));
	return panels.flatMap(({ targets }: { targets: { expr: string; legendFormat: string }[] }) =>
		targets.map(({ expr, legendFormat }) => ({
			expr: expr.replaceAll("$__rate_interval", "5m").replaceAll("$instance", ".*"),
			words: legendFormat,
		})),
	);
}

describe("metrics in deploy/", () => {
	/** Values of labels, by metric and label. */
	const known = new Map<string, Map<string, Set<string>>>();

	beforeAll(async () => {
		const disk = join(home, "disk");
		await using server = await Server.start({
			port: 0,
			httpPort: 0,
			memory: 16 * 4096,
			chunkSize: 16,
			disk,
		});
		await using cache = await PrefixCache.open({ via: server, identity: "m", bytesPerChunk: 64 });
		await cache.store(new Uint32Array(64), () => new Uint8Array(64));
		const { hostname, port } = new URL(`http://${server.httpAddress}`);
		const rude = connect(Number(port), hostname);
		rude.end("no HTTP\r\n\r\n"); // so that something is dropped
		rude.resume();
		await once(rude, "close");
		const text = await (await fetch(`http://${server.httpAddress}/metrics`)).text();
		for (const line of text.split("\n").filter((line) => line.startsWith("kvferry_"))) {
			const [, name = "", labels = ""] = /^(\w+)(?:\{(.*)\})? /.exec(line) ?? [];
			const values = known.get(name) ?? new Map<string, Set<string>>();
			known.set(name, values);
			for (const [, label = "", value = ""] of labels.matchAll(/(\w+)="([^"]*)"/g)) {
				values.set(label, (values.get(label) ?? new Set()).add(value));
			}
		}
	});

	/** What the disk and the remote each have. */
	const OF_TIERS =
		/_(written_bytes_total|read_bytes_total|tier_queue_\w+|saves_total|failed_loads_total)\b/;

	function check({ expr, words }: Used): void {
		const used = [...expr.matchAll(/\b(kvferry_\w+)(?:\{([^}]*)\})?/g)];
		if (expr.includes("sum") && OF_TIERS.test(expr)) {
			expect(expr, "two tiers are not one").toContain("tier");
			expect(words).toContain("tier");
		}
		const labels = new Set(ADDED);
		for (const [, name = "", selector = ""] of used) {
			const values = known.get(name);
			expect(values, `${name} in ${expr}`).toBeDefined();
			for (const label of values?.keys() ?? []) {
				labels.add(label);
			}
			for (const [, label = "", operator, value = ""] of selector.matchAll(
				/(\w+)(=~?)"([^"]*)"/g,
			)) {
				if (!ADDED.includes(label)) {
					const all = values?.get(label) ?? new Set();
					const wanted = operator === "=" ? [value] : value.split("|");
					expect([...all], `${label} of ${name}`).toEqual(expect.arrayContaining(wanted));
				}
			}
		}
		const by = [...expr.matchAll(/\bby \(([^)]*)\)/g)].flatMap(([, list = ""]) => list.split(", "));
		const told = [...words.matchAll(/\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}/g)].map(
			([, label]) => label,
		);
		expect([...labels], `${expr} and ${words}`).toEqual(expect.arrayContaining([...by, ...told]));
	}

	it.each(alerts())("of an alert are a server's: $expr", (used) => {
		expect(used.expr).not.toBe("");
		check(used);
	});

	it.each(dashboard())("of the dashboard are a server's: $expr", (used) => {
		expect(used.expr).toContain("kvferry_");
		check(used);
	});

	const promtool = tool("promtool", "the syntax of alerts and dashboard");
	it.skipIf(promtool === undefined)("are in expressions that Prometheus understands", () => {
		const rules = dashboard().map(({ expr }, at) => ({ record: `panel:${at}`, expr }));
		const file = join(home, "panels.yml");
		writeFileSync(file, JSON.stringify({ groups: [{ name: "panels", rules }] }));
		for (const name of [file, join(root, "deploy", "alerts.yml")]) {
			const checked = spawnSync(promtool as string, ["check", "rules", name], { encoding: "utf8" });
			expect(checked).toMatchObject({ status: 0, stdout: expect.stringContaining("SUCCESS") });
		}
	});
});

describe("command lines in deploy/", () => {
	/** What the settings would be. */
	function settings(args: string[], env: Record<string, string>) {
		const printed = spawnSync(process.execPath, [main, ...args, "--print-config", "--json"], {
			encoding: "utf8",
			env: { PATH: process.env.PATH, ...env },
		});
		expect(printed.stderr).toBe("");
		return JSON.parse(printed.stdout).settings;
	}

	it("of the unit start a server", () => {
		const file = join(home, "kvferry.json");
		writeFileSync(file, '{"memory": "64GiB"}');
		const start = /^ExecStart=\/usr\/bin\/env kvferry (.*)$/m.exec(deploy("kvferry.service"))?.[1];
		const args = (start ?? "").replace("/etc/kvferry.json", file).split(" ");
		expect(settings(args, {})).toMatchObject({
			memory: { value: 64 * 2 ** 30 },
			disk: { value: "/var/cache/kvferry" },
			quotas: { value: "/var/lib/kvferry/quotas.json" },
			log: { value: "json" },
		});
	});

	it("of the container start a server", () => {
		const text = deploy("Containerfile").replaceAll("\\\n", " ");
		const list = (name: string): string[] =>
			JSON.parse(new RegExp(`^${name} (\\[.*\\])$`, "m").exec(text)?.[1] ?? "[]");
		const env = [...(/^ENV (.*)$/m.exec(text)?.[1]?.matchAll(/(\w+)=(\S+)/g) ?? [])];
		expect(list("ENTRYPOINT")).toEqual(["kvferry"]);
		const variables = Object.fromEntries(env.map(([, name, value]) => [name, value]));
		expect(settings(list("CMD"), variables)).toMatchObject({
			disk: { value: "/var/cache/kvferry", source: "environment" },
			log: { value: "json", source: "environment" },
		});
	});

	it("of the container's health check tell a server that lives from one that does not", async () => {
		const text = deploy("Containerfile").replaceAll("\\\n", " ");
		const [, command = "[]"] = /^HEALTHCHECK .*? CMD (\[.*\])$/m.exec(text) ?? [];
		const [program, ...args]: string[] = JSON.parse(command);
		expect(program).toBe("node");
		await using server = await Server.start({ port: 0, httpPort: 0, memory: 2 ** 20 });
		const port = new URL(`http://${server.httpAddress}`).port;
		const health = async (port: string) => {
			const { spawn } = await import("node:child_process");
			const env = { ...process.env, KVFERRY_SERVE_HTTP_PORT: port };
			const [code] = await once(spawn(process.execPath, args, { env, stdio: "ignore" }), "exit");
			return code;
		};
		expect(await health(port)).toBe(0);
		expect(await health("1")).toBe(1);
	});

	const analyze = tool("systemd-analyze", "the unit's syntax");
	it.skipIf(analyze === undefined)("are in a unit that systemd understands", () => {
		const unit = join(root, "deploy", "kvferry.service");
		const checked = spawnSync(analyze as string, ["verify", unit], { encoding: "utf8" });
		expect(checked).toMatchObject({ status: 0, stderr: "" });
	});
});
