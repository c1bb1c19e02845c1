// The operators' page in a real browser, on a real server.

import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { Client, PrefixCache, Server } from "../ts/index.js";
import { Browser, findBrowser } from "./browser.js";

const program = findBrowser();
if (program === undefined) {
	process.stderr.write(
		"SKIPPED the page in a browser: there is no chromium (apt-get install chromium)\n",
	);
}
const CHUNK = 16;
const BYTES = 4000;
/** As rude as a salt and a name may be: no @ and no /. */
const RUDE = `"><img src=x onerror="document.title='owned'"><script>1`;

describe.skipIf(program === undefined)("the page", () => {
	const home = mkdtempSync(join(tmpdir(), "kvferry-page-"));
	let server: Server;
	let client: Client;
	let cache: PrefixCache;
	let browser: Browser;
	let http: string;

	const prompt = (chunks: number) => Uint32Array.from({ length: chunks * CHUNK }, (_, at) => at);
	const text = (selector: string) =>
		browser.evaluate<string>(`document.querySelector(${JSON.stringify(selector)}).innerText`);
	const look = async (chunks: number, cacheSalt = "") => {
		await using hit = await cache.lookup(prompt(chunks), { cacheSalt });
		return hit.chunks * CHUNK;
	};

	beforeAll(async () => {
		const memory = 16 * 4096;
		server = await Server.start({ port: 0, httpPort: 0, memory, chunkSize: CHUNK, disk: home });
		http = `http://${server.httpAddress}`;
		const quota = await fetch(`${http}/quotas/tenant`, {
			method: "PUT",
			headers: { "content-type": "application/json" },
			body: JSON.stringify({ salt: RUDE, cap: 8 * 4096 }),
		});
		expect(quota.status).toBe(200);
		client = await Client.connect({ url: `tcp://${server.address}` });
		cache = await PrefixCache.open({ via: client, identity: RUDE, bytesPerChunk: BYTES });
		await cache.store(prompt(2), () => new Uint8Array(BYTES));
		await cache.store(prompt(4), () => new Uint8Array(BYTES), { cacheSalt: RUDE });
		browser = await Browser.start(program as string);
		await browser.resize(1280, 900);
		await browser.open(http);
	});

	afterAll(async () => {
		await browser?.[Symbol.asyncDispose]();
		await client?.close();
		await server?.close();
		rmSync(home, { recursive: true, force: true });
	});

	it("shows hit ratio, tiers, tenants, traffic and slow operations", async () => {
		await expect.poll(() => text("#ready"), { timeout: 15_000 }).toBe("ready");
		await expect.poll(() => text("#tiers")).toMatch(/^memory\tworks\t[\s\S]*\ndisk\tworks\t/);
		expect(await text("#used")).toBe("24.0 KiB");
		expect(await text("#stored-bytes")).toMatch(/\/s; 6 chunks since the start/);
		expect(await text("#loaded-bytes")).toMatch(/\/s; 0 chunks/);
		await expect.poll(() => text("#operations")).toMatch(/prepare_store\t2\t/);
		expect(await text("#slow")).toMatch(/none of 100 ms or more|ms/);
		expect(await text("#tenants")).toMatch(/^none\t8.0 KiB\t12.5 %\tnone\t0 B\t2\t0 B$/m);
	});

	it("shows a tenant's name as what it is: text", async () => {
		await expect.poll(() => text("#tenants"), { timeout: 15_000 }).toContain("<img src=x");
		expect(await text("#tenants")).toMatch(
			/^"\\"><img src=x .*… \([0-9a-f]{16}\)\t16.0 KiB\t25.0 %\t32.0 KiB\t/m,
		);
		expect(await browser.evaluate("document.title")).toBe("kvferry");
		expect(await browser.evaluate("document.images.length")).toBe(0);
		expect(await browser.evaluate("document.scripts.length")).toBe(1);
	});

	it("goes on by itself after another hit", async () => {
		expect(await text("#ratio-all")).toMatch(/0 of \d+ tokens|–/);
		expect(await look(2)).toBe(2 * CHUNK);
		await expect.poll(() => text("#ratio-all")).toMatch(/, 32 of \d+ tokens/);
		expect(await look(4, RUDE)).toBe(4 * CHUNK);
		await expect.poll(() => text("#ratio-all")).toMatch(/, 96 of \d+ tokens/);
		expect(await text("#ratio")).toMatch(/^\d+\.\d %$/);
	});

	it("fits a narrow screen", async () => {
		await browser.resize(320, 700);
		const page = "document.documentElement";
		await expect.poll(() => browser.evaluate("innerWidth")).toBe(320);
		// Nothing sticks out.
		expect(await browser.evaluate(`${page}.scrollWidth - ${page}.clientWidth`)).toBe(0);
		const columns = "getComputedStyle(document.querySelector('main')).gridTemplateColumns";
		expect((await browser.evaluate<string>(columns)).split(" ")).toHaveLength(1);
	});

	it("asks nobody else, and complains of nothing", () => {
		expect(browser.requests.length).toBeGreaterThan(2);
		expect(browser.requests.filter((url) => !url.startsWith(`${http}/`))).toEqual([]);
		expect(browser.complaints).toEqual([]);
	});

	it("says when the server is gone", async () => {
		await client.close();
		await server.close();
		await expect.poll(() => text("#gone"), { timeout: 15_000 }).toMatch(/^The server is gone/);
		expect(await text("#ready")).toBe("gone");
	});
});
