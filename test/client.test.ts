import { once } from "node:events";
import { createServer } from "node:net";
import { describe, expect, it } from "vitest";
import { failureOf } from "../ts/cache.js";
import { Client, type ClientOptions, KvferryError, PrefixCache, Server } from "../ts/index.js";
import { ServerProcess } from "./server-process.js";

it("a client whose close was refused for its options is open, and closes later", async () => {
	await using server = await Server.start({ port: 0, memory: 2 ** 20 });
	const client = await Client.connect({ url: `tcp://${server.address}` });
	await expect(client.close({ timeoutMs: 0 })).rejects.toMatchObject({ code: "INVALID_ARGUMENT" });
	expect(await client.ping()).toBeGreaterThan(0);
	await client.close();
	await client.close();
	await expect(client.ping()).rejects.toMatchObject({ code: "CLOSED" });
});

it("a hit whose cache is closed before it is loaded says so", async () => {
	await using server = await Server.start({ port: 0, memory: 2 ** 20, chunkSize: 64 });
	await using client = await Client.connect({ url: `tcp://${server.address}` });
	await using cache = await PrefixCache.open({ via: client, identity: "m", bytesPerChunk: 1000 });
	await cache.store(prompt, bytesOf);
	const hit = await cache.lookup(prompt);
	await cache.close();
	expect(await hit.load()).toEqual([]);
	expect(hit).toMatchObject({
		chunks: 2,
		failure: { code: "CLOSED", message: expect.stringContaining(`tcp://${server.address}`) },
	});
});

it("calls that wait refuse an option that they do not have", async () => {
	await using server = await Server.start({ port: 0, memory: 2 ** 20, chunkSize: 64 });
	await using client = await Client.connect({ url: `tcp://${server.address}` });
	await using cache = await PrefixCache.open({ via: client, identity: "m", bytesPerChunk: 1000 });
	await cache.store(prompt, bytesOf);
	await using hit = await cache.lookup(prompt);
	const wrong = { timeout: 5 };
	for (const [of, call] of Object.entries({
		ping: () => client.ping(wrong as object),
		status: () => client.status(wrong as object),
		clear: () => client.clear(wrong as object),
		events: () => client.events(wrong as object),
		close: () => client.close(wrong as object),
		load: () => hit.load(undefined, wrong as object),
	})) {
		await expect(call(), of).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: `${of} has no option "timeout": did you mean timeoutMs?`,
		});
	}
	await expect(server.events({ cursr: 0 } as object)).rejects.toMatchObject({
		message: 'events has no option "cursr": did you mean cursor?',
	});
	await expect(client.ping(null as unknown as object)).rejects.toMatchObject({
		code: "INVALID_ARGUMENT",
	});
	expect(await hit.load()).toHaveLength(hit.chunks);
	expect(hit.chunks).toBeGreaterThan(0);
});

it("a close that is aborted stops waiting and goes on", async () => {
	await using server = await Server.start({ port: 0, memory: 2 ** 20 });
	const client = await Client.connect({ url: `tcp://${server.address}` });
	await expect(client.close({ signal: AbortSignal.abort() })).rejects.toMatchObject({
		code: "ABORTED",
	});
	await expect(client.ping()).rejects.toMatchObject({ code: "CLOSED" });
	await client.close();
});

it("a cache misses once its client was closed, and says so", async () => {
	await using server = await Server.start({ port: 0, memory: 2 ** 20, chunkSize: 64 });
	const client = await Client.connect({ url: `tcp://${server.address}` });
	await using cache = await PrefixCache.open({ via: client, identity: "m", bytesPerChunk: 1000 });
	await cache.store(prompt, bytesOf);
	const hit = await cache.lookup(prompt);
	await client.close();
	const failure = { code: "CLOSED", message: expect.stringContaining(client.url) };
	expect(await cache.lookup(prompt)).toMatchObject({ chunks: 0, failure });
	expect(await cache.store(prompt, bytesOf)).toMatchObject({ storedChunks: 0, failure });
	expect(await hit.load()).toEqual([]);
	expect(hit.failure?.code).toBe("CLOSED");
});

/** A port where nobody listens. */
async function freePort(): Promise<number> {
	const server = createServer().listen(0, "127.0.0.1");
	await once(server, "listening");
	const { port } = server.address() as { port: number };
	server.close();
	await once(server, "close");
	return port;
}

/** A client that goes on without a server, and what it was warned of. */
async function careless(options: ClientOptions): Promise<[Client, string[]]> {
	const warnings: string[] = [];
	const onWarning = (message: string) => warnings.push(message);
	return [await Client.connect({ whenUnreachable: "warn", onWarning, ...options }), warnings];
}

const prompt = Uint32Array.from({ length: 2 * 64 }, (_, at) => at);
const bytesOf = (chunk: number) => new Uint8Array(1000).fill(chunk + 1);

describe("without a server", () => {
	it("connecting throws, and says what to start where", async () => {
		const port = await freePort();
		await expect(Client.connect({ url: `tcp://127.0.0.1:${port}` })).rejects.toMatchObject({
			code: "UNREACHABLE",
			message: expect.stringContaining(`npx kvferry serve --port ${port}`),
		});
	});

	it("a client that was told to warns once, misses, and joins the server that comes", async () => {
		const port = await freePort();
		const url = `tcp://127.0.0.1:${port}`;
		const [connected, warnings] = await careless({ url, chunkSize: 64 });
		await using client = connected;
		expect(client).toMatchObject({ connected: false, chunkSize: 64 });
		await using cache = await PrefixCache.open({ via: client, identity: "m", bytesPerChunk: 1000 });
		expect(cache.chunkSize).toBe(64);
		const hit = await cache.lookup(prompt);
		expect(hit).toMatchObject({ chunks: 0, failure: { code: "UNREACHABLE" } });
		expect(await hit.load()).toEqual([]);
		expect(await cache.store(prompt, bytesOf)).toMatchObject({
			storedChunks: 0,
			failure: { code: "UNREACHABLE" },
		});
		await expect(client.ping()).rejects.toMatchObject({ code: "UNREACHABLE" });

		await using _server = await Server.start({ port, memory: 2 ** 22, chunkSize: 64 });
		await expect.poll(() => client.connected, { timeout: 20_000 }).toBe(true);
		expect((await cache.store(prompt, bytesOf)).storedChunks).toBe(2);
		const found = await cache.lookup(prompt);
		expect(found).toMatchObject({ chunks: 2, failure: undefined });
		expect(await found.load()).toEqual([bytesOf(0), bytesOf(1)]);
		expect(warnings).toHaveLength(1);
		expect(warnings[0]).toContain(url);
		expect(warnings[0]).toContain(`npx kvferry serve --port ${port} --chunk-size 64`);
		await client.close();
		expect(client.connected).toBe(false);
	});

	it("warns as Node.js does, unless told otherwise", async () => {
		const url = `tcp://127.0.0.1:${await freePort()}`;
		const warning = once(process, "warning") as Promise<[Error]>;
		await using client = await Client.connect({ url, whenUnreachable: "warn" });
		expect(client.chunkSize).toBe(256);
		const [{ name, message }] = await warning;
		expect(name).toBe("KvferryWarning");
		expect(message).toContain(url);
	});

	it("a server that came with other chunks is a miss, and both sizes are said", async () => {
		const port = await freePort();
		const [connected] = await careless({ url: `127.0.0.1:${port}` });
		await using client = connected;
		await using cache = await PrefixCache.open({ via: client, identity: "m", bytesPerChunk: 1000 });
		await using _server = await Server.start({ port, memory: 2 ** 22, chunkSize: 64 });
		const failure = async () => (await cache.lookup(new Uint32Array(256))).failure;
		await expect
			.poll(failure, { timeout: 20_000 })
			.toMatchObject({ code: "PROTOCOL", message: expect.stringMatching(/of 64 .*with 256/) });
		expect(client.connected).toBe(false);
	});

	it("a start is held up for 3 seconds at most, whatever the timeout", async () => {
		const silent = createServer().listen(0, "127.0.0.1");
		await once(silent, "listening");
		const { port } = silent.address() as { port: number };
		const [client, warnings] = await careless({ url: `127.0.0.1:${port}`, timeoutMs: 60_000 });
		expect(warnings).toEqual([expect.stringContaining("did not answer within 3s")]);
		await client.close();
		silent.close();
	});

	it("a server that is stopped counts as none, and is joined when it goes on", async () => {
		await using server = await ServerProcess.start();
		await server.stop();
		const [connected, warnings] = await careless({ url: server.url, timeoutMs: 200 });
		await using client = connected;
		await using cache = await PrefixCache.open({ via: client, identity: "m", bytesPerChunk: 1000 });
		const missed = await cache.lookup(new Uint32Array(256));
		expect(missed.failure?.code).toBe("UNREACHABLE");
		expect(warnings).toEqual([expect.stringContaining(server.url)]);
		expect(warnings[0]).toContain(`npx kvferry serve --port ${server.port}`);
		server.signal("SIGCONT");
		await expect.poll(() => client.connected, { timeout: 20_000 }).toBe(true);
		expect((await cache.store(new Uint32Array(256), bytesOf)).storedChunks).toBe(1);
	});
});

it("a server that is there decides, and nothing is warned of", async () => {
	await using server = await Server.start({ port: 0, memory: 2 ** 20, chunkSize: 64 });
	const [connected, warnings] = await careless({ url: `tcp://${server.address}`, chunkSize: 128 });
	await using client = connected;
	expect(client).toMatchObject({ connected: true, chunkSize: 64 });
	expect(warnings).toEqual([]);
});

it("a server without shared memory is a failure of the cache, not of its caller", () => {
	const error = new KvferryError("UNSUPPORTED_OPTION", "the server offers no shared memory");
	expect(failureOf(error)).toBe(error);
	const mistake = new KvferryError("INVALID_SALT", "a salt");
	expect(() => failureOf(mistake)).toThrow(mistake);
});

it("options of a start without a server are checked by name", async () => {
	for (const [name, options] of Object.entries({
		whenUnreachable: { whenUnreachable: "ignore" },
		chunkSize: { chunkSize: 0 },
		onWarning: { onWarning: "console" },
	})) {
		await expect(Client.connect(options as never)).rejects.toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringContaining(name),
		});
	}
});

it.each([
	["a text", "tcp://127.0.0.1:9", "the options of Client.connect must be an object"],
	["a misspelt option", { uri: "tcp://127.0.0.1:9" }, 'no option "uri": did you mean url?'],
	["an option of another name", { timeout: 9 }, 'no option "timeout": did you mean timeoutMs?'],
])("connects nowhere with %s", async (_, options, message) => {
	const connecting = Client.connect(options as never);
	await expect(connecting).rejects.toMatchObject({
		code: "INVALID_ARGUMENT",
		message: expect.stringContaining(message),
	});
});
