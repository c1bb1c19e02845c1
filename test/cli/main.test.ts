// The built program, as a shell starts it.

import { type ChildProcess, spawn, spawnSync } from "node:child_process";
import { once } from "node:events";
import { readFileSync } from "node:fs";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";

const main = fileURLToPath(new URL("../../dist/cli/main.js", import.meta.url));

function kvferry(...args: string[]) {
	return spawnSync(process.execPath, [main, ...args], { encoding: "utf8", timeout: 20_000 });
}

describe("kvferry", () => {
	it("prints the package's version", () => {
		const manifest = readFileSync(new URL("../../package.json", import.meta.url), "utf8");
		expect(kvferry("--version")).toMatchObject({
			status: 0,
			stdout: `${JSON.parse(manifest).version}\n`,
		});
	});

	it("explains every command", () => {
		for (const args of [[], ["help"], ["--help"], ["-h"], ["serve", "--help"], ["serve", "-h"]]) {
			const { status, stdout } = kvferry(...args);
			expect(status).toBe(0);
			expect(stdout).toMatch(
				/serve[\s\S]*--memory[\s\S]*ping[\s\S]*status[\s\S]*doctor[\s\S]*--tokens/,
			);
		}
	});

	it("ends quietly when nobody reads any further", () => {
		const shell = `"${process.execPath}" "${main}" --help | true; echo "\${PIPESTATUS[0]}"`;
		for (let run = 0; run < 5; run++) {
			const ended = spawnSync("bash", ["-c", shell], { encoding: "utf8", timeout: 20_000 });
			expect(ended).toMatchObject({ stdout: "0\n", stderr: "" });
		}
	});

	it("names a command that it does not know, and those it does", () => {
		const { status, stderr, stdout } = kvferry("evict");
		expect(status).toBe(1);
		expect(stdout).toBe("");
		expect(stderr).toBe(
			"INVALID_ARGUMENT: evict is no command: give one of serve, ping, status, replay, doctor, or --help.\n",
		);
	});

	it("tells errors as JSON where it is asked to", () => {
		const { status, stderr } = kvferry("serve", "--host", "0.0.0.0", "--json");
		expect(status).toBe(1);
		expect(JSON.parse(stderr)).toMatchObject({ code: "UNSUPPORTED_OPTION" });
	});

	it("says that nobody answers", () => {
		for (const command of ["ping", "status"]) {
			const { status, stderr } = kvferry(command, "--url", "tcp://127.0.0.1:1");
			expect(status).toBe(1);
			expect(stderr).toMatch(/^UNREACHABLE: .*127\.0\.0\.1:1/);
		}
	});
});

describe("a running server", () => {
	let server: ChildProcess;
	let url: string;
	const shmName = `kvferry_test_${process.pid}`;

	beforeAll(async () => {
		const flags = ["--port", "0", "--memory", "8MiB", "--shm-name", shmName, "--json"];
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
		});
		url = started.url;
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

	it("leaves its port to none and its pool to none", () => {
		const port = new URL(url).port;
		const samePort = kvferry("serve", "--port", port, "--memory", "8MiB");
		expect(samePort).toMatchObject({ status: 1, stdout: "" });
		expect(samePort.stderr).toMatch(/^ADDRESS_IN_USE: /);
		const samePool = kvferry("serve", "--port", "0", "--memory", "8MiB", "--shm-name", shmName);
		expect(samePool).toMatchObject({ status: 1, stdout: "" });
		expect(samePool.stderr).toMatch(/^POOL_IN_USE: /);
	});

	it("ends with SIGTERM, and its address answers no more", async () => {
		const exit = once(server, "exit");
		server.kill("SIGTERM");
		expect(await exit).toEqual([0, null]);
		expect(kvferry("ping", "--url", url).stderr).toMatch(/^UNREACHABLE: /);
	});
});
