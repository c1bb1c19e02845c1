// Tokens, from an option, a file or the environment to a server that asks for one.

import { execFile } from "node:child_process";
import { chmodSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { afterAll, afterEach, beforeAll, describe, expect, it, vi } from "vitest";
import {
	Client,
	createConnector,
	PrefixCache,
	resolveOffloading,
	Server,
	type ServerOptions,
} from "../ts/index.js";
import { ServerProcess } from "./server-process.js";

const CLI = fileURLToPath(new URL("../dist/cli/main.js", import.meta.url));
const DATA = "data-token-of-the-tests-0123456789";
const ADMIN = "admin-token-of-the-tests-0123456789";
const METRICS = "metrics-token-of-the-tests-0123456789";
const memory = 2 ** 20;

const directory = mkdtempSync(join(tmpdir(), "kvferry-token-"));
const tokenFile = join(directory, "tokens");
const dataOnly = join(directory, "data");

beforeAll(() => {
	const mode = { mode: 0o600 };
	writeFileSync(
		tokenFile,
		`# of the tests\ndata = ${DATA}\nadmin = ${ADMIN}\nmetrics = ${METRICS}\n`,
		mode,
	);
	writeFileSync(dataOnly, `data = ${DATA}\n`, mode);
});

afterEach(() => {
	vi.unstubAllEnvs();
});

afterAll(() => rmSync(directory, { recursive: true }));

/** A server that lets nobody in without a token, and its url on this machine. */
async function start(options: ServerOptions = {}) {
	const server = await Server.start({
		host: "0.0.0.0",
		port: 0,
		listenPublic: true,
		tokenFile,
		memory,
		chunkSize: 16,
		...options,
	});
	return Object.assign(server, { url: `tcp://127.0.0.1:${server.address?.split(":").pop()}` });
}

describe("Server.start", () => {
	it("does not listen where others reach it without the flag and the file", async () => {
		for (const options of [
			{ listenPublic: true },
			{ tokenFile },
			{ listenPublic: true, tokenFile: join(directory, "none") },
		]) {
			const started = Server.start({ host: "0.0.0.0", port: 0, memory, ...options });
			await expect(started).rejects.toMatchObject({
				code: expect.stringMatching(/^(UNSUPPORTED_OPTION|SYSTEM)$/),
			});
		}
	});

	it("takes no file that others may read", async () => {
		const open = join(directory, "open");
		writeFileSync(open, readFileSync(tokenFile));
		chmodSync(open, 0o644);
		await expect(Server.start({ port: 0, memory, tokenFile: open })).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringContaining("chmod 600"),
		});
	});

	it.each([{ listenPublic: 1 }, { tokenFile: 1 }, { ipc: 1 }])("refuses %j", async (options) => {
		await expect(Server.start({ port: 0, memory, ...(options as object) })).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringContaining(Object.keys(options)[0] as string),
		});
	});
});

describe("Client.connect", () => {
	it("shows a token from the option, a file or the environment", async () => {
		await using server = await start();
		const { url } = server;
		await expect(Client.connect({ url })).rejects.toMatchObject({ code: "UNAUTHORIZED" });
		for (const options of [{ token: DATA }, { tokenFile }, { tokenFile: dataOnly }]) {
			await using client = await Client.connect({ url, ...options });
			expect(await client.ping()).toBeGreaterThan(0);
		}
		vi.stubEnv("KVFERRY_TOKEN", DATA);
		await using client = await Client.connect({ url });
		expect(await client.ping()).toBeGreaterThan(0);
		await expect(Client.connect({ url, token: DATA, tokenFile })).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
		});
	});

	it("is told what is wrong, and the token is in no message", async () => {
		await using server = await start();
		await using open = await Server.start({ port: 0, memory });
		for (const [url, token, code] of [
			[server.url, "s3cret-s3cret", "UNAUTHORIZED"],
			[`tcp://${open.address}`, "s3cret-s3cret", "UNSUPPORTED_OPTION"],
			[server.url, "s3cret".repeat(50), "INVALID_ARGUMENT"],
			["tcp://192.0.2.1:5555", undefined, "UNSUPPORTED_OPTION"],
		] as const) {
			const error: unknown = await Client.connect({ url, token }).catch((error) => error);
			expect(error).toMatchObject({ code, message: expect.not.stringContaining("s3cret") });
		}
	});

	it("leaves what concerns everybody to the admin", async () => {
		await using server = await start();
		await using client = await Client.connect({ url: server.url, token: DATA });
		const forbidden = { code: "UNAUTHORIZED", message: expect.stringContaining("admin token") };
		await expect(client.clear()).rejects.toMatchObject(forbidden);
		await expect(client.status()).rejects.toMatchObject(forbidden);
		await expect(client.events()).rejects.toMatchObject(forbidden);
		await using admin = await Client.connect({ url: server.url, token: ADMIN });
		await admin.clear();
		expect(await admin.status()).toMatchObject({ objects: 0 });
	});

	it("is no reason to stop where a server comes back with other tokens: its caches miss", async () => {
		const server = await start();
		const port = Number(server.address?.split(":").pop());
		await using client = await Client.connect({ url: server.url, token: DATA });
		const cache = await PrefixCache.open({ via: client, identity: "i", bytesPerChunk: 8 });
		const tokens = Uint32Array.from({ length: 16 }, (_, i) => i);
		const bytes = () => Buffer.from("by a way");
		await cache.store(tokens, bytes);
		const held = await cache.lookup(tokens);
		await server.close();
		const others = join(directory, "others");
		const lines = readFileSync(tokenFile, "utf8").replaceAll("token-of", "other-token-of");
		writeFileSync(others, lines, { mode: 0o600 });
		await using _again = await start({ port, tokenFile: others });
		const deadline = performance.now() + 20_000;
		let hit = await cache.lookup(tokens);
		while (hit.failure?.code !== "UNAUTHORIZED" && performance.now() < deadline) {
			hit = await cache.lookup(tokens);
		}
		expect(hit).toMatchObject({ chunks: 0, failure: { code: "UNAUTHORIZED" } });
		const refused = { storedChunks: 0, failure: { code: "UNAUTHORIZED" } };
		expect(await cache.store(tokens, bytes)).toMatchObject(refused);
		expect(await held.load()).toEqual([]);
	}, 30_000);

	it("reaches a server's Unix socket, without a token", async () => {
		const ipc = join(directory, "sockets", "server");
		await using _server = await start({ ipc });
		await using client = await Client.connect({ url: `ipc://${ipc}` });
		await using cache = await PrefixCache.open({ via: client, identity: "ipc", bytesPerChunk: 8 });
		const tokens = Uint32Array.from({ length: 16 }, (_, i) => i);
		expect(await cache.store(tokens, () => Buffer.from("by a way"))).toMatchObject({
			storedChunks: 1,
		});
		await using hit = await cache.lookup(tokens);
		expect(hit.chunks).toBe(1);
	});
});

describe("connectors", () => {
	const engine = { modelName: "m", blockSize: 16 };

	it.each([
		["an option", {}, { token: DATA }],
		["a file", {}, { tokenFile }],
		["the configuration", { "kvferry.token_file": tokenFile }, {}],
	])("show the token of %s", async (_, extra, options) => {
		await using server = await start();
		const resolved = resolveOffloading({
			kvOffloadingSize: 1,
			kvOffloadingBackend: "lmcache",
			kvTransferConfig: {
				kvConnectorExtraConfig: {
					"lmcache.mp.host": "127.0.0.1",
					"lmcache.mp.port": Number(new URL(server.url).port),
					...extra,
				},
			},
		});
		await using connectors = await createConnector(resolved, { ...engine, ...options });
		expect(connectors?.via).toMatchObject({ connected: true });
	});
});

describe("kvferry", () => {
	async function kvferry(args: string[], env: Record<string, string> = {}) {
		const options = { env: { ...process.env, ...env }, timeout: 20_000 };
		return await promisify(execFile)(process.execPath, [CLI, ...args], options).catch(
			(error: { stdout: string; stderr: string }) => error,
		);
	}

	it("shows the admin's token for what it asks, and prints none", async () => {
		const flags = ["--host", "0.0.0.0", "--listen-public", "--token-file", tokenFile];
		await using server = await ServerProcess.start(...flags, "--http-port", "0");
		const url = `tcp://127.0.0.1:${server.port}`;
		for (const [args, env, told] of [
			[["ping"], {}, /UNAUTHORIZED: .*wants a token/],
			[["ping", "--token-file", tokenFile], {}, /answered in/],
			[["clear", "--token-file", tokenFile], {}, /keeps only/],
			[["clear", "--token-file", dataOnly], {}, /UNAUTHORIZED: .*admin token/],
			[["clear"], { KVFERRY_TOKEN: ADMIN }, /keeps only/],
			[["status", "--json"], { KVFERRY_TOKEN: ADMIN }, /"dropped_messages":\d/],
			[["ping"], { KVFERRY_TOKEN: "s3cret-s3cret" }, /UNAUTHORIZED: .*does not know/],
		] as const) {
			const { stdout, stderr } = await kvferry([...args, "--url", url], env);
			expect(`${stdout}${stderr}`).toMatch(told);
			expect(`${stdout}${stderr}`).not.toMatch(/s3cret|token-of-the-tests/);
		}
		const doctor = ["doctor", "--server", url, "--token-file", tokenFile, "--json"];
		expect(JSON.parse((await kvferry(doctor)).stdout)).toMatchObject({ healthy: true });
		const arguments_ = readFileSync(`/proc/${server.process.pid}/cmdline`, "utf8");
		expect(arguments_).not.toContain("token-of-the-tests");
	});

	it("shows it for quotas as well", async () => {
		await using server = await start({ httpPort: 0 });
		const http = ["--http", `http://127.0.0.1:${server.httpAddress?.split(":").pop()}`];
		const { stderr } = await kvferry(["quota", ...http]);
		expect(stderr).toMatch(/^UNAUTHORIZED: .*admin token/);
		const set = ["quota", "set", "--default", "--cap", "1MiB", ...http];
		const { stdout } = await kvferry([...set, "--token-file", tokenFile]);
		expect(stdout).toMatch(/each of 0 others\s+1 MiB/);
		expect((await kvferry(["quota", ...http], { KVFERRY_TOKEN: DATA })).stderr).toMatch(
			/^UNAUTHORIZED/,
		);
	});
});
