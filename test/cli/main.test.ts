// The built program, as a shell starts it.

import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { connect } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { Client, PrefixCache, Server } from "../../ts/index.js";
import { ServerProcess } from "../server-process.js";

const main = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));

function kvferry(...args: string[]) {
	return spawnSync(process.execPath, [main, ...args], { encoding: "utf8", timeout: 20_000 });
}

/** Does not keep a server in this process from answering. */
async function run(...args: string[]): Promise<{ status: number | null }> {
	const [status] = await once(
		spawn(process.execPath, [main, ...args], { stdio: "ignore" }),
		"exit",
	);
	return { status };
}

describe("kvferry", () => {
	it("prints the package's version", () => {
		const manifest = readFileSync(new URL("../../package.json", import.meta.url), "utf8");
		expect(kvferry("--version")).toMatchObject({
			status: 0,
			stdout: `${JSON.parse(manifest).version}\n`,
		});
		expect(kvferry("serve", "--version").stdout).toBe(kvferry("-v").stdout);
	});

	it("explains every command", () => {
		for (const args of [[], ["help"], ["--help"], ["-h"]]) {
			const { status, stdout } = kvferry(...args);
			expect(status).toBe(0);
			expect(stdout).toMatch(
				/serve[\s\S]*--memory[\s\S]*ping[\s\S]*status[\s\S]*doctor[\s\S]*--tokens/,
			);
		}
	});

	it("explains one command", () => {
		for (const args of [
			["quota", "--help"],
			["quota", "set", "-h"],
			["help", "quota"],
		]) {
			const { status, stdout } = kvferry(...args);
			expect(status).toBe(0);
			expect(stdout).toMatch(/^Usage: kvferry quota [\s\S]*--guarantee[\s\S]*--json/);
			expect(stdout).not.toMatch(/--memory|--tokens/);
		}
		expect(kvferry("replay", "--help").stdout).toMatch(/^Usage: kvferry replay FILE /);
		expect(kvferry("ping", "--help").stdout).toMatch(/^Usage: kvferry ping [\s\S]*--timeout-ms/);
	});

	it("ends quietly when nobody reads any further", () => {
		const shell = `"${process.execPath}" "${main}" --help | true; echo "\${PIPESTATUS[0]}"`;
		for (let run = 0; run < 5; run++) {
			const ended = spawnSync("bash", ["-c", shell], { encoding: "utf8", timeout: 20_000 });
			expect(ended).toMatchObject({ stdout: "0\n", stderr: "" });
		}
	});

	it.skipIf(process.platform !== "linux")("says that stdout takes nothing", () => {
		const shell = `"${process.execPath}" "${main}" --help > /dev/full`;
		expect(spawnSync("bash", ["-c", shell], { encoding: "utf8" })).toMatchObject({
			status: 1,
			stderr: expect.stringMatching(/^SYSTEM: stdout: ENOSPC[^\n]*\n$/),
		});
	});

	it("names a command that it does not know, and those it does", () => {
		const { status, stderr, stdout } = kvferry("statsu");
		expect(status).toBe(1);
		expect(stdout).toBe("");
		expect(stderr).toBe(
			"INVALID_ARGUMENT: statsu is no command: did you mean status? There are serve, ping, status, quota, clear, bench, replay, doctor, and --help.\n",
		);
		expect(kvferry("install").stderr).toMatch(
			/^INVALID_ARGUMENT: install is no command: there are serve, /,
		);
	});

	it("tells errors as JSON where it is asked to", () => {
		const { status, stderr } = kvferry("serve", "--host", "0.0.0.0", "--json");
		expect(status).toBe(1);
		expect(JSON.parse(stderr)).toMatchObject({ code: "UNSUPPORTED_OPTION" });
	});

	it("prints the settings of a server with their sources, and starts none", () => {
		const home = mkdtempSync(join(tmpdir(), "kvferry-settings-"));
		try {
			const file = join(home, "kvferry.json");
			writeFileSync(file, '{"memory": "8MiB", "policy": "lru", "port": 1}');
			const env = { KVFERRY_SERVE_PORT: "2", KVFERRY_SERVE_CONFIG: file };
			const ask = (...args: string[]) =>
				spawnSync(process.execPath, [main, "serve", "--print-config", ...args], {
					encoding: "utf8",
					env: { ...process.env, ...env },
				});
			const { settings } = JSON.parse(ask("--json", "--policy", "arc").stdout);
			expect(settings).toMatchObject({
				policy: { value: "arc", source: "flag", place: "--policy" },
				port: { value: 2, source: "environment", place: "KVFERRY_SERVE_PORT" },
				memory: { value: 8 << 20, source: "file", place: file },
				host: { value: "127.0.0.1", source: "default" },
				disk: { value: null, source: "default" },
			});
			expect(ask().stdout).toMatch(
				/^setting +value +source\n[\s\S]*^memory +8MiB +\/.*kvferry\.json\n/m,
			);
			const wrong = ask("--prot", "1");
			expect(wrong).toMatchObject({ status: 1, stdout: "" });
			expect(wrong.stderr).toMatch(/^INVALID_ARGUMENT: .*--port/);
		} finally {
			rmSync(home, { recursive: true });
		}
	});

	it("says that nobody answers HTTP", () => {
		const { status, stderr } = kvferry("quota", "--http", "http://127.0.0.1:1");
		expect(status).toBe(1);
		expect(stderr).toMatch(/^UNREACHABLE: .*http:\/\/127\.0\.0\.1:1.*--http/);
	});

	it("says that nobody answers", () => {
		for (const command of ["ping", "status", "clear"]) {
			const { status, stderr } = kvferry(command, "--url", "tcp://127.0.0.1:1");
			expect(status).toBe(1);
			expect(stderr).toMatch(/^UNREACHABLE: .*127\.0\.0\.1:1/);
		}
	});
});

describe("a running server", () => {
	let server: ChildProcess;
	let url: string;
	let httpUrl: string;
	const shmName = `kvferry_test_${process.pid}`;

	beforeAll(async () => {
		const ports = ["--port", "0", "--http-port", "0"];
		const flags = [...ports, "--memory", "8MiB", "--shm-name", shmName, "--log", "off", "--json"];
		server = spawn(process.execPath, [main, "serve", ...flags], {
			stdio: ["ignore", "pipe", "inherit"],
		});
		const [line] = await once(
			createInterface({ input: server.stdout as NodeJS.ReadableStream }),
			"line",
		);
		const started = JSON.parse(line);
		expect(started).toEqual({
			url: expect.stringMatching(/^tcp:\/\/127\.0\.0\.1:\d+$/),
			shmName,
			memory: 8 << 20,
			httpUrl: expect.stringMatching(/^http:\/\/127\.0\.0\.1:\d+$/),
		});
		url = started.url;
		httpUrl = started.httpUrl;
	});

	afterAll(() => server.kill("SIGKILL"));

	it("answers ping", () => {
		expect(kvferry("ping", "--url", url).stdout).toMatch(/^tcp:.* answered in \d+\.\d\d ms\n$/);
		expect(JSON.parse(kvferry("ping", "--url", url, "--json").stdout)).toEqual({
			url,
			ms: expect.any(Number),
		});
	});

	it("tells its status", () => {
		const fields = JSON.parse(kvferry("status", "--url", url, "--json").stdout);
		expect(Object.keys(fields).length).toBeGreaterThan(0);
		const { stdout } = kvferry("status", "--url", url);
		for (const name of Object.keys(fields)) {
			expect(stdout).toContain(name);
		}
	});

	it("empties the cache and says so", async () => {
		await using client = await Client.connect({ url });
		await using cache = await PrefixCache.open({ via: client, identity: "m", bytesPerChunk: 64 });
		const store = () => cache.store(new Uint32Array(512), () => new Uint8Array(64));
		const objects = async () => (await client.status()).objects;
		for (const json of [[], ["--json"]]) {
			await store();
			expect(await objects()).toBe(2);
			const { status, stderr, stdout } = kvferry("clear", "--url", url, ...json);
			expect([status, stderr]).toEqual([0, ""]);
			expect(stdout).toContain(url);
			expect(await objects()).toBe(0);
		}
	});

	it("answers HTTP with the same figures", async () => {
		const health = await fetch(`${httpUrl}/healthz`);
		expect([health.status, await health.json()]).toEqual([200, { healthy: true }]);
		const fields = JSON.parse(kvferry("status", "--url", url, "--json").stdout);
		const figures = (await (await fetch(`${httpUrl}/status`)).json()) as object;
		expect(Object.keys(figures)).toEqual(expect.arrayContaining(Object.keys(fields)));
		const page = await fetch(httpUrl);
		expect(page.headers.get("content-type")).toMatch(/^text\/html/);
	});

	it("lists, sets and takes back quotas", () => {
		const quota = (...args: string[]) => kvferry("quota", ...args, "--http", httpUrl);
		const json = (...args: string[]) => JSON.parse(quota(...args, "--json").stdout);
		expect(json().tenants).toEqual({});
		const salt = 'a "b';
		const set = json("set", "--salt", salt, "--cap", "4MiB", "--guarantee", "1MiB");
		expect(set.tenants[salt]).toMatchObject({ cap: 4 << 20, guarantee: 1 << 20, used_bytes: 0 });
		const told = quota("set", "--default", "--cap", "2MiB").stdout;
		expect(told).toMatch(/^"a \\"b" +4 MiB +1 MiB +0 B +0 +0 B$/m);
		expect(told).toMatch(/^each of 0 others +2 MiB +0 B/m);
		expect(told).toMatch(
			/^1 MiB of 8 MiB are guaranteed\nthis ends with the server: .*--quotas FILE\n$/m,
		);
		const refused = quota("set", "--salt", "b", "--guarantee", "8MiB");
		expect(refused).toMatchObject({ status: 1, stdout: "" });
		expect(refused.stderr).toMatch(/^INVALID_ARGUMENT: 9437184 bytes are guaranteed/);
		expect(Object.keys(json().tenants)).toEqual([salt]);
		expect(json("unset", "--salt", salt).tenants).toEqual({});
		const again = quota("unset", "--salt", salt, "--json");
		expect(again.status).toBe(1);
		expect(JSON.parse(again.stderr).message).toMatch(/no quota of its own/);
		expect(json("set", "--default").default).toEqual({ cap: null, guarantee: 0 });
	});

	it("keeps quotas in a file from one start to the next, and refuses one that is broken", async () => {
		const home = mkdtempSync(join(tmpdir(), "kvferry-quotas-"));
		try {
			const file = join(home, "quotas.json");
			const start = () => Server.start({ port: 0, httpPort: 0, memory: 8 << 20, quotas: file });
			{
				await using server = await start();
				const http = `http://${server.httpAddress}`;
				const { status } = await run(
					"quota",
					"set",
					"--salt",
					"acme",
					"--cap",
					"1MiB",
					"--http",
					http,
				);
				expect(status).toBe(0);
			}
			const { tenants } = JSON.parse(readFileSync(file, "utf8"));
			expect(tenants).toEqual({ acme: { cap: 1 << 20, guarantee: 0 } });
			{
				await using server = await start();
				const answer = await fetch(`http://${server.httpAddress}/quotas`);
				expect(await answer.json()).toMatchObject({ persistent: true, tenants });
			}
			writeFileSync(file, '{"tenants":{"acme":{"cup":1}}}');
			const broken = {
				code: "INVALID_ARGUMENT",
				message: expect.stringMatching(/quotas\.json.*"cap"/),
			};
			await expect(start()).rejects.toMatchObject(broken);
			await expect(
				Server.start({ listen: false, memory: 8 << 20, quotas: file }),
			).rejects.toMatchObject(broken);
		} finally {
			rmSync(home, { recursive: true });
		}
	});

	it("says where it answers HTTP on a line of its own, after the one that was always there", async () => {
		const flags = ["--port", "0", "--http-port", "0", "--memory", "8MiB", "--log", "off"];
		const other = spawn(process.execPath, [main, "serve", ...flags], {
			stdio: ["ignore", "pipe", "inherit"],
		});
		const lines: string[] = [];
		for await (const line of createInterface({ input: other.stdout })) {
			lines.push(line);
			if (lines.length === 2) {
				break;
			}
		}
		other.kill("SIGTERM");
		expect(lines[0]).toMatch(
			/^kvferry serves tcp:\/\/127\.0\.0\.1:\d+ from pool \S+ of 8388608 bytes$/,
		);
		expect(lines[1]).toMatch(/^its page, health and metrics: http:\/\/127\.0\.0\.1:\d+$/);
	});

	it("leaves its ports to none and its pool to none", () => {
		const port = new URL(url).port;
		const off = ["--http-port", "off", "--memory", "8MiB"];
		const samePort = kvferry("serve", "--port", port, ...off);
		expect(samePort).toMatchObject({ status: 1, stdout: "" });
		expect(samePort.stderr).toMatch(/^ADDRESS_IN_USE: /);
		const http = ["--http-port", new URL(httpUrl).port, "--memory", "8MiB"];
		const sameHttp = kvferry("serve", "--port", "0", ...http);
		expect(sameHttp).toMatchObject({ status: 1, stdout: "" });
		expect(sameHttp.stderr).toMatch(/^ADDRESS_IN_USE: .*--http-port/);
		const logged = kvferry("serve", "--port", port, ...off, "--log", "json");
		expect(logged).toMatchObject({ status: 1, stdout: "" });
		expect(JSON.parse(logged.stderr)).toMatchObject({
			level: "error",
			event: "start_failed",
			detail: expect.stringMatching(/^ADDRESS_IN_USE: /),
		});
		const samePool = kvferry("serve", "--port", "0", ...off, "--shm-name", shmName);
		expect(samePool).toMatchObject({ status: 1, stdout: "" });
		expect(samePool.stderr).toMatch(/^POOL_IN_USE: /);
	});

	it("logs what happens as lines of JSON, a storm of one kind as one line, and no salt", async () => {
		const flags = ["--port", "0", "--http-port", "0", "--memory", "8MiB", "--log", "json"];
		const other = spawn(process.execPath, [main, "serve", "--json", ...flags], {
			stdio: ["ignore", "pipe", "pipe"],
		});
		const lines: Record<string, unknown>[] = [];
		createInterface({ input: other.stderr }).on("line", (line) => lines.push(JSON.parse(line)));
		const exit = once(other, "exit");
		const [line] = await once(createInterface({ input: other.stdout }), "line");
		const { httpUrl } = JSON.parse(line);
		const put = (path: string, body: object, method = "PUT") =>
			fetch(`${httpUrl}${path}`, {
				method,
				headers: { "content-type": "application/json" },
				body: JSON.stringify(body),
			});
		expect((await put("/quotas/tenant", { salt: "s3cret", cap: 4096 })).status).toBe(200);
		expect((await put("/clear", { confirm: true, salt: "s3cret" }, "POST")).status).toBe(200);
		const { hostname, port } = new URL(httpUrl);
		for (let storm = 0; storm < 30; storm++) {
			const rude = connect(Number(port), hostname);
			rude.end("no HTTP\r\n\r\n");
			rude.resume();
			await once(rude, "close");
		}
		other.kill("SIGTERM");
		expect(await exit).toEqual([0, null]);
		expect(lines.map(({ event }) => event)).toEqual(
			expect.arrayContaining(["started", "quotas_changed", "cleared", "stopping", "stopped"]),
		);
		const dropped = lines.filter(({ event }) => event === "messages_dropped");
		expect(dropped.length).toBeLessThan(10);
		expect(dropped.reduce((sum, { count }) => sum + Number(count), 0)).toBe(30);
		expect(dropped[0]).toMatchObject({
			level: "warn",
			detail: "http_malformed",
			time: expect.stringMatching(/^\d{4}-\d\d-\d\dT/),
		});
		expect(JSON.stringify(lines)).not.toContain("s3cret");
	});

	it("ends though nobody reads its log", async () => {
		const flags = ["--port", "0", "--http-port", "off", "--memory", "8MiB"];
		// Nobody reads the pipe, and it is full before the server starts.
		const script = `mkfifo "$0/log"; exec 4<>"$0/log"; timeout 1 cat /dev/zero >&4; exec "$@" 2>&4`;
		const home = mkdtempSync(join(tmpdir(), "kvferry-log-"));
		const args = ["-c", script, home, process.execPath, main, "serve", "--json", ...flags];
		const other = spawn("bash", args, { stdio: ["ignore", "pipe", "inherit"] });
		const exit = once(other, "exit");
		try {
			await once(createInterface({ input: other.stdout }), "line");
			other.kill("SIGTERM");
			expect(await exit).toEqual([0, null]);
		} finally {
			other.kill("SIGKILL");
			rmSync(home, { recursive: true });
		}
	}, 20_000);

	it.each(['exec "$@" > >(:)', 'exec "$@" > /dev/full'])(
		"serves on though stdout takes nothing: %s",
		async (script) => {
			const flags = ["--port", "0", "--http-port", "off", "--memory", "8MiB"];
			const other = spawn(
				"bash",
				["-c", script, "bash", process.execPath, main, "serve", ...flags],
				{
					stdio: ["ignore", "pipe", "pipe"],
				},
			);
			const exit = once(other, "exit");
			const lines: string[] = [];
			createInterface({ input: other.stderr }).on("line", (line) => lines.push(line));
			await expect.poll(() => lines.join("\n"), { timeout: 20_000 }).toMatch(/ info started: /);
			other.kill("SIGTERM");
			expect(await exit).toEqual([0, null]);
			expect(lines.at(-1)).toMatch(/ info stopped: /);
		},
	);

	it("says that it is not public though it may be", async () => {
		const flags = ["--port", "0", "--http-port", "off", "--memory", "8MiB", "--listen-public"];
		const other = spawn(process.execPath, [main, "serve", ...flags], {
			stdio: ["ignore", "ignore", "pipe"],
		});
		let log = "";
		other.stderr.setEncoding("utf8").on("data", (text: string) => {
			log += text;
		});
		const exit = once(other, "exit");
		await expect.poll(() => log).toMatch(/ warn not_public: .*127\.0\.0\.1: give --host ADDRESS/);
		other.kill("SIGTERM");
		await exit;
	});

	it("ends with SIGHUP as with SIGTERM, and takes its pool along", async () => {
		await using other = await ServerProcess.start("--memory", "8MiB");
		const pool = `/dev/shm/${other.shmName}`;
		expect(existsSync(pool)).toBe(true);
		const exit = once(other.process, "exit");
		other.signal("SIGHUP");
		other.signal("SIGHUP"); // the terminal's, and its shell's
		expect(await exit).toEqual([0, null]);
		expect(existsSync(pool)).toBe(false);
	});

	it("ends with SIGTERM, and its addresses answer no more", async () => {
		const exit = once(server, "exit");
		server.kill("SIGTERM");
		expect(await exit).toEqual([0, null]);
		expect(kvferry("ping", "--url", url).stderr).toMatch(/^UNREACHABLE: /);
		await expect(fetch(`${httpUrl}/healthz`)).rejects.toThrow();
	});
});
