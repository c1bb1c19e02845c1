import { spawn } from "node:child_process";
import { once } from "node:events";
import { createServer as createHttpServer } from "node:http";
import { type AddressInfo, createServer } from "node:net";
import { createInterface } from "node:readline";
import { setImmediate } from "node:timers/promises";
import { afterEach, describe, expect, it } from "vitest";
import { installMoto } from "../scripts/moto.mjs";
import { skipped } from "../scripts/onnx.mjs";
import { Client, PrefixCache, Server } from "../ts/index.js";
import { freePort, hasRedis, RedisProcess } from "./redis-process.js";
import { ServerProcess } from "./server-process.js";

const CHUNK = 16;
const BYTES = 10_000;

const open: AsyncDisposable[] = [];

afterEach(async () => {
	for (const handle of open.splice(0).reverse()) {
		await handle[Symbol.asyncDispose]();
	}
});

function kept<T extends AsyncDisposable>(handle: T): T {
	open.push(handle);
	return handle;
}

async function server(remote: string, options = {}): Promise<Server> {
	const embedded = { listen: false, memory: 2 ** 22, chunkSize: CHUNK, remote };
	return kept(await Server.start({ ...embedded, ...options }));
}

async function cacheOf(via: Server | Client, bytesPerChunk = BYTES): Promise<PrefixCache> {
	return kept(await PrefixCache.open({ via, identity: "model", bytesPerChunk }));
}

/** A prompt of so many chunks, unlike those of other seeds from the first token on. */
function tokens(chunks: number, seed = 0): Uint32Array {
	return Uint32Array.from({ length: chunks * CHUNK }, (_, at) => 1000 * seed + at);
}

function bytesOf(seed: number, bytes = BYTES): (chunk: number) => Uint8Array {
	return (chunk) => new Uint8Array(bytes).fill(7 * seed + chunk + 1);
}

/** The chunks that are read, each compared with what was stored. */
async function read(
	cache: PrefixCache,
	chunks: number,
	{
		seed = 0,
		salt,
		bytes = BYTES,
	}: Partial<{ seed: number; salt: string | undefined; bytes: number }> = {},
): Promise<number> {
	const loaded = await (await cache.lookup(tokens(chunks, seed), { cacheSalt: salt })).load();
	const expected = bytesOf(seed, bytes);
	expect(loaded.every((one, chunk) => Buffer.compare(one, expected(chunk)) === 0)).toBe(true);
	return loaded.length;
}

/** Waits until all that was stored is in the remote. */
async function saved(via: Server, objects: number): Promise<void> {
	const told = () => Number(via.status().remote_saves) + Number(via.status().remote_known_saves);
	await expect.poll(told, { timeout: 20_000 }).toBe(objects);
}

describe("a remote's URL", () => {
	it.each([
		"redis://:hunter2@127.0.0.1:70000",
		"redis://a,b",
		"http://:hunter2@127.0.0.1",
		"s3://key:hunter2@bucket",
		"hunter2@nowhere",
	])("that is wrong is named with an example and without its secrets: %s", async (url) => {
		const error = await server(url).catch((error) => error);
		expect(error).toMatchObject({
			code: "INVALID_ARGUMENT",
			message: expect.stringContaining("redis://127.0.0.1:6379/0"),
		});
		expect(String(error.stack)).not.toContain("hunter2");
	});
});

describe.skipIf(!hasRedis())("a cache with Redis", () => {
	async function redis(...args: string[]): Promise<[RedisProcess, string]> {
		const process = kept(await RedisProcess.start(...args));
		return [process, `redis://127.0.0.1:${process.port}/0`];
	}

	it("finds what another server stored, under its salt alone", async () => {
		const [, url] = await redis();
		const [first, second] = [await server(url), await server(url)];
		await (await cacheOf(first)).store(tokens(5), bytesOf(0), { cacheSalt: "tenant-a" });
		await saved(first, 5);
		const cache = await cacheOf(second);
		for (const salt of ["tenant-b", "", undefined]) {
			expect(await read(cache, 5, { salt })).toBe(0);
		}
		expect(await read(cache, 9, { salt: "tenant-a" })).toBe(5);
		expect(second.status()).toMatchObject({
			remote_loads: 5,
			remote_promoted_chunks: 5,
			promoted_chunks: 0,
			remote_damaged: 0,
		});
	});

	it("stores in the database and under the prefix that its URL names, and hits nothing of others", async () => {
		const [process, url] = await redis();
		const own = url.replace(/0$/, "3?prefix=team/a");
		const first = await server(own);
		await (await cacheOf(first)).store(tokens(2), bytesOf(0));
		await saved(first, 2);
		expect(process.cli("-n", "3", "--scan", "--pattern", "team/a/1/0/*").split("\n")).toHaveLength(
			2,
		);
		expect(process.cli("-n", "0", "dbsize")).toBe("0");
		expect(await read(await cacheOf(await server(url.replace(/0$/, "3"))), 2)).toBe(0);
		expect(await read(await cacheOf(await server(own)), 2)).toBe(2);
	});

	it("takes a value that was changed for a miss, and what is computed anew is kept", async () => {
		const [process, url] = await redis();
		const first = await server(url);
		await (await cacheOf(first)).store(tokens(3), bytesOf(0));
		await saved(first, 3);
		const keys = process.cli("--scan", "--pattern", "kvferry/1/0/*").split("\n");
		for (const key of keys) {
			process.cli("setrange", key, "9000", "changed");
		}
		const second = await server(url);
		const cache = await cacheOf(second);
		expect(await read(cache, 3)).toBe(0);
		expect(second.status()).toMatchObject({ remote_loads: 0, remote_damaged: 3 });
		await expect
			.poll(() => process.cli("--scan", "--pattern", "kvferry/1/0/*"), { timeout: 20_000 })
			.toBe("");
		await cache.store(tokens(3), bytesOf(0));
		await saved(second, 3);
		expect(await read(await cacheOf(await server(url)), 3)).toBe(3);
	});

	it("carries values of 32 MiB", async () => {
		const [, url] = await redis();
		const bytes = 2 ** 25 - 4096;
		const options = { memory: 2 ** 28 };
		const first = await server(url, options);
		await (await cacheOf(first, bytes)).store(tokens(2), bytesOf(0, bytes));
		await saved(first, 2);
		const cache = await cacheOf(await server(url, options), bytes);
		expect(await read(cache, 2, { bytes })).toBe(2);
	});

	it("forgets for all servers what one of them clears", async () => {
		const [process, url] = await redis();
		const [first, second] = [
			kept(await ServerProcess.start("--remote", url, "--chunk-size", String(CHUNK))),
			await server(url),
		];
		const via = kept(await Client.connect({ url: first.url }));
		const cache = await cacheOf(via);
		await cache.store(tokens(3), bytesOf(0));
		await expect.poll(async () => (await via.status()).remote_saves, { timeout: 20_000 }).toBe(3);
		await via.clear();
		expect(await read(cache, 3)).toBe(0);
		const other = await cacheOf(second);
		// Its keeper comes round every 10 s. A hit would be kept in memory: another salt asks the remote.
		await cache.store(tokens(2, 1), bytesOf(1));
		await expect.poll(() => read(other, 2, { seed: 1 }), { timeout: 25_000 }).toBe(2);
		expect(await read(other, 3)).toBe(0);
		// An epoch that Redis evicts is told it again.
		const epoch = process.cli("get", "kvferry/1/epoch");
		process.cli("del", "kvferry/1/epoch");
		const again = () => process.cli("get", "kvferry/1/epoch");
		await expect.poll(again, { timeout: 20_000 }).toBe(epoch);
	}, 60_000);

	it("answers every request while Redis is killed and started again, and hits return", async () => {
		const [process, url] = await redis();
		// Too little memory for the prompts: what is found comes from Redis.
		const sizes = ["--memory", "512KiB", "--chunk-size", String(CHUNK)];
		const serving = kept(await ServerProcess.start("--remote", url, "--http-port", "0", ...sizes));
		const via = kept(await Client.connect({ url: serving.url }));
		const cache = await cacheOf(via);
		const status = () => via.status();
		const PROMPTS = 20;
		for (let seed = 0; seed < PROMPTS; seed++) {
			await cache.store(tokens(4, seed), bytesOf(seed));
			// Little may wait in so little memory.
			await expect.poll(async () => (await status()).remote_queue_bytes).toBe(0);
		}
		expect(await status()).toMatchObject({ remote_saves: 4 * PROMPTS });

		let [over, requests, hits] = [false, 0, 0];
		const load = Array.from({ length: 4 }, async (_, worker) => {
			for (let turn = worker; !over; turn += 3) {
				const seed = turn % PROMPTS;
				hits += await read(cache, 4, { seed }); // rejects unless it is answered, and right
				await cache.store(tokens(4, seed), bytesOf(seed));
				requests++;
			}
		});
		const more = async (count: number) => {
			const goal = requests + count;
			while (requests < goal) {
				await Promise.race([setImmediate(), ...load]);
			}
		};
		await more(100);
		expect(hits).toBeGreaterThan(0);
		await process.kill();
		await expect
			.poll(async () => (await status()).remote_failure, { timeout: 20_000 })
			.not.toBe("");
		await more(100);
		await process.start();
		await expect.poll(async () => (await status()).remote_failure, { timeout: 20_000 }).toBe("");
		const before = Number((await status()).remote_loads);
		await more(100);
		over = true;
		await Promise.all(load);
		const after = await status();
		expect(Number(after.remote_loads)).toBeGreaterThan(before);
		expect(after).toMatchObject({ remote_damaged: 0, leases: 0, remote_outages: 1 });
		for (let seed = 0; seed < PROMPTS; seed++) {
			expect(await read(cache, 4, { seed })).toBe(4);
		}
	});

	it("finds out by one request that all its connections are lost", async () => {
		const [process, url] = await redis();
		const first = await server(url);
		const stored = await cacheOf(first);
		await stored.store(tokens(12, 0), bytesOf(0));
		await stored.store(tokens(12, 1), bytesOf(1));
		await saved(first, 24);
		const second = await server(url);
		const cache = await cacheOf(second);
		expect(await read(cache, 12, { seed: 0 })).toBe(12); // over each connection
		process.cli("client", "kill", "type", "normal", "skipme", "yes");
		expect(await read(cache, 12, { seed: 1 })).toBe(12);
		expect(Number(second.status().remote_retries)).toBeLessThanOrEqual(1);
	});

	it("answers within its deadlines while Redis does not move", async () => {
		const [process, url] = await redis();
		const first = await server(url);
		await (await cacheOf(first)).store(tokens(3), bytesOf(0));
		await saved(first, 3);
		const second = await server(url);
		const cache = await cacheOf(second);
		process.signal("SIGSTOP");
		await expect
			.poll(
				async () => {
					expect(await read(cache, 3)).toBe(0);
					return second.status().remote_outages;
				},
				{ timeout: 25_000 },
			)
			.toBe(1);
		process.signal("SIGCONT");
		await expect.poll(() => read(cache, 3), { timeout: 20_000 }).toBe(3);
	});

	it("starts without Redis, says so, and is joined by it", async () => {
		const process = kept(await RedisProcess.prepare());
		const url = `redis://me:hunter2@127.0.0.1:${process.port}/0`;
		const serving = kept(
			await ServerProcess.start("--remote", url, "--http-port", "0", "--chunk-size", String(CHUNK)),
		);
		const via = kept(await Client.connect({ url: serving.url }));
		const cache = await cacheOf(via);
		await cache.store(tokens(2), bytesOf(0));
		expect(await read(cache, 2)).toBe(2);
		const told = JSON.stringify(await via.status());
		expect(told).toContain("remote_failure");
		expect(told).not.toContain("hunter2");
		await process.start();
		process.cli("acl", "setuser", "me", "on", ">hunter2", "~*", "+@all");
		await expect
			.poll(async () => (await via.status()).remote_failure, { timeout: 20_000 })
			.toBe("");
	});

	it("says which credentials are missing", async () => {
		const [process] = await redis("--requirepass", "hunter2");
		for (const credentials of ["", ":wrong@"]) {
			const url = `redis://${credentials}127.0.0.1:${process.port}/0`;
			const serving = kept(await ServerProcess.start("--remote", url));
			const via = kept(await Client.connect({ url: serving.url }));
			await expect
				.poll(async () => (await via.status()).remote_failure, { timeout: 20_000 })
				.toMatch(/auth.*give .*KVFERRY_REDIS_PASSWORD/i);
		}
	});

	it("tells operators of it, and no password", async () => {
		const [process] = await redis("--requirepass", "hunter2");
		const http = await freePort();
		const url = `redis://:hunter2@127.0.0.1:${process.port}/0`;
		const args = ["--remote", url, "--http-port", String(http), "--chunk-size", String(CHUNK)];
		const serving = kept(await ServerProcess.start(...args));
		const cache = await cacheOf(kept(await Client.connect({ url: serving.url })));
		const get = async (path: string) => (await fetch(`http://127.0.0.1:${http}${path}`)).text();
		await cache.store(tokens(2), bytesOf(0));
		await expect
			.poll(() => get("/metrics"), { timeout: 20_000 })
			.toContain('\nkvferry_saves_total{tier="remote"} 2\n');
		await expect.poll(() => get("/readyz"), { timeout: 20_000 }).toContain('"remote":{"ok":true');
		const [status, metrics] = [await get("/status"), await get("/metrics")];
		expect(JSON.parse(status).tiers.remote).toMatchObject({
			place: `redis://***@127.0.0.1:${process.port}/0`,
			failed: false,
		});
		expect(metrics).toContain('kvferry_tier_ready{tier="remote"} 1');
		expect(metrics).toContain('kvferry_tier_request_seconds_count{tier="remote",request="save"} 2');
		expect(status + metrics).not.toContain("hunter2");
		await process.kill();
		await expect
			.poll(() => get("/readyz"), { timeout: 25_000 })
			.toMatch(/"ready":true.*"remote":\{"ok":false,"reason":/);
		expect(await get("/metrics")).toContain('kvferry_tier_failed{tier="remote"} 1');
		expect((await get("/status")) + (await get("/readyz"))).not.toContain("hunter2");
	});

	/** A cluster of three; the hosts of its nodes. */
	async function cluster(): Promise<[RedisProcess[], string[]]> {
		const nodes = await Promise.all(
			[1, 2, 3].map(() => RedisProcess.start("--cluster-enabled", "yes")),
		);
		nodes.map(kept);
		const hosts = nodes.map((node) => `127.0.0.1:${node.port}`);
		nodes[0]?.cli("--cluster", "create", ...hosts, "--cluster-yes");
		const info = () => nodes.map((node) => /cluster_state:ok/.test(node.cli("cluster", "info")));
		await expect.poll(info, { timeout: 20_000 }).toEqual([true, true, true]);
		return [nodes, hosts];
	}

	it("spreads its objects over a cluster, and finds them there", async () => {
		const [nodes, hosts] = await cluster();
		const url = `redis+cluster://${hosts.slice(0, 2).join(",")}`;
		const [first, second] = [await server(url), await server(url)];
		await (await cacheOf(first)).store(tokens(30), bytesOf(0));
		await saved(first, 30);
		const sizes = nodes.map((node) => Number(node.cli("dbsize")));
		expect(sizes.every((size) => size > 0)).toBe(true);
		expect(await read(await cacheOf(second), 31)).toBe(30);
	});

	it("reaches a cluster though one of the nodes that it is told of says nothing for long", async () => {
		const [, hosts] = await cluster();
		const silent = createServer((socket) => void setTimeout(() => socket.destroy(), 3000));
		silent.listen(0, "127.0.0.1");
		await once(silent, "listening");
		kept({ [Symbol.asyncDispose]: async () => void silent.close() });
		const { port } = silent.address() as AddressInfo;
		const url = `redis+cluster://127.0.0.1:${port},${hosts[0]}`;
		const sizes = ["--chunk-size", String(CHUNK)];
		const serving = kept(await ServerProcess.start("--remote", url, ...sizes));
		const via = kept(await Client.connect({ url: serving.url }));
		const told = async (name: string) => (await via.status())[name];
		await expect.poll(() => told("remote_failure"), { timeout: 20_000 }).toBe("");
		await (await cacheOf(via)).store(tokens(5), bytesOf(0));
		await expect.poll(() => told("remote_saves"), { timeout: 20_000 }).toBe(5);
		expect(await read(await cacheOf(await server(`redis+cluster://${hosts[1]}`)), 5)).toBe(5);
	});
});

describe("a cache with an S3 that is slow and knows no conditions", () => {
	/** Values by path. HEAD requests beyond `heads` are not answered; whose header has a condition is refused. */
	async function slow() {
		const told = { values: new Map<string, Buffer>(), heads: Number.POSITIVE_INFINITY, refused: 0 };
		const store = createHttpServer(async (request, response) => {
			const path = request.url as string;
			const chunks: Buffer[] = [];
			for await (const chunk of request) {
				chunks.push(chunk);
			}
			const value = told.values.get(path);
			if (request.method === "HEAD" && told.heads-- <= 0) {
				return;
			}
			if (request.headers["if-none-match"] !== undefined) {
				told.refused++;
				response.writeHead(501).end();
			} else if (request.method === "PUT") {
				told.values.set(path, Buffer.concat(chunks));
				response.writeHead(200, { etag: '"1"' }).end();
			} else if (request.method === "DELETE") {
				told.values.delete(path);
				response.writeHead(204).end();
			} else if (value === undefined) {
				response.writeHead(404).end();
			} else {
				response.writeHead(200, { "content-length": value.length, etag: '"1"' });
				response.end(request.method === "HEAD" ? undefined : value);
			}
		}).listen(0, "127.0.0.1");
		await once(store, "listening");
		kept({
			[Symbol.asyncDispose]: async () => {
				store.close();
				store.closeAllConnections();
			},
		});
		const { port } = store.address() as AddressInfo;
		return { told, url: `s3://bucket/kv?region=r&endpoint=http://127.0.0.1:${port}` };
	}

	it("hits what was told within a question's time, and tells it the epoch again", async () => {
		Object.assign(process.env, { AWS_ACCESS_KEY_ID: "id", AWS_SECRET_ACCESS_KEY: "hunter2" });
		const { told, url } = await slow();
		const first = await server(url);
		await (await cacheOf(first)).store(tokens(30), bytesOf(0));
		await saved(first, 30);
		const second = await server(url);
		const cache = await cacheOf(second);
		for (const hit of [4, 8]) {
			told.heads = 4; // of the first round
			expect(await read(cache, 30)).toBe(hit);
		}
		expect(second.status()).toMatchObject({ remote_question_failures: 0, remote_outages: 0 });
		told.heads = Number.POSITIVE_INFINITY;
		expect(await read(cache, 30)).toBe(30);

		const epoch = () => told.values.get("/bucket/kv/1/epoch")?.toString();
		const args = ["--remote", url, "--chunk-size", String(CHUNK)];
		const serving = kept(await ServerProcess.start(...args));
		await kept(await Client.connect({ url: serving.url })).clear();
		await expect.poll(epoch, { timeout: 20_000 }).toMatch(/^[0-9a-f]{16}$/);
		const before = epoch();
		told.values.delete("/bucket/kv/1/epoch");
		await expect.poll(epoch, { timeout: 20_000 }).toBe(before);
		expect(told.refused).toBeGreaterThan(0);
	}, 60_000);
});

/** Python with moto; undefined where it is refused, and a line says so. */
const moto = (() => {
	try {
		return installMoto();
	} catch (error) {
		skipped("the remote tier with S3", error);
		return undefined;
	}
})();

describe.skipIf(moto === undefined)("a cache with S3", () => {
	const credentials = { AWS_ACCESS_KEY_ID: "id", AWS_SECRET_ACCESS_KEY: "hunter2" };

	/** An S3 with a bucket; its URL. */
	async function s3(): Promise<{ url: string; endpoint: string; stop: () => Promise<void> }> {
		const port = await freePort();
		const args = ["-m", "moto.server", "-H", "127.0.0.1", "-p", String(port)];
		const child = spawn(moto as string, args, { stdio: ["ignore", "ignore", "pipe"] });
		const exited = once(child, "exit");
		const stop = async () => {
			child.kill("SIGKILL");
			await exited;
		};
		kept({ [Symbol.asyncDispose]: stop });
		for await (const line of createInterface({ input: child.stderr })) {
			if (line.includes("Running on")) {
				break;
			}
		}
		child.stderr.resume();
		const endpoint = `http://127.0.0.1:${port}`;
		expect((await fetch(`${endpoint}/bucket`, { method: "PUT" })).ok).toBe(true);
		return { url: `s3://bucket/team/kv?region=us-east-1&endpoint=${endpoint}`, endpoint, stop };
	}

	async function serving(url: string): Promise<Client> {
		Object.assign(process.env, credentials);
		const started = await ServerProcess.start("--remote", url, "--chunk-size", String(CHUNK));
		return kept(await Client.connect({ url: kept(started).url }));
	}

	it("finds what another server stored, under its salt alone, and goes on without S3", async () => {
		const { url, endpoint, stop } = await s3();
		const first = await serving(url);
		await (await cacheOf(first)).store(tokens(30), bytesOf(0), { cacheSalt: "tenant-a" });
		await expect
			.poll(async () => (await first.status()).remote_saves, { timeout: 20_000 })
			.toBe(30);
		const listed = await (await fetch(`${endpoint}/bucket?list-type=2`)).text();
		expect(listed.match(/<Key>team\/kv\/1\/0\//g)).toHaveLength(30);
		const second = await serving(url);
		const cache = await cacheOf(second);
		expect(await read(cache, 30)).toBe(0);
		expect(await read(cache, 31, { salt: "tenant-a" })).toBe(30);
		expect(await second.status()).toMatchObject({ remote_loads: 30, remote_damaged: 0 });
		expect(JSON.stringify(await second.status())).not.toContain("hunter2");
		await stop();
		expect(await read(cache, 3, { seed: 1 })).toBe(0);
		await cache.store(tokens(3, 1), bytesOf(1));
		expect(await read(cache, 3, { seed: 1 })).toBe(3);
	});

	it("says which credentials are missing", async () => {
		const { url } = await s3();
		for (const name of Object.keys(credentials)) {
			delete process.env[name];
		}
		process.env.AWS_EC2_METADATA_DISABLED = "true"; // the machine's role, which is asked over the network
		const started = kept(await ServerProcess.start("--remote", url));
		const via = kept(await Client.connect({ url: started.url }));
		await expect
			.poll(async () => (await via.status()).remote_failure, { timeout: 20_000 })
			.toMatch(/credential.*give .*AWS_ACCESS_KEY_ID/);
	});

	it("takes an object that was changed for a miss", async () => {
		const { url, endpoint } = await s3();
		const first = await serving(url);
		await (await cacheOf(first)).store(tokens(1), bytesOf(0));
		await expect.poll(async () => (await first.status()).remote_saves, { timeout: 20_000 }).toBe(1);
		const listed = await (await fetch(`${endpoint}/bucket?list-type=2`)).text();
		const key = /<Key>(team\/kv\/1\/0\/[^<]+)</.exec(listed)?.[1];
		const object = `${endpoint}/bucket/${key}`;
		// moto asks whose a request is, and believes what it is told.
		const scope = "Credential=id/20260101/us-east-1/s3/aws4_request";
		const authorization = `AWS4-HMAC-SHA256 ${scope}, SignedHeaders=host, Signature=0`;
		const headers = { authorization };
		const bytes = new Uint8Array(await (await fetch(object, { headers })).arrayBuffer());
		bytes.set([77], 9000);
		expect((await fetch(object, { method: "PUT", body: bytes, headers })).ok).toBe(true);
		const second = await serving(url);
		expect(await read(await cacheOf(second), 1)).toBe(0);
		expect(await second.status()).toMatchObject({ remote_loads: 0, remote_damaged: 1 });
	});
});
