// vLLM on the CPU, with LMCache's connector, against our server.

import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { Client } from "../../ts/index.js";
import { freePort } from "../connector/token-engine.js";
import { ServerProcess } from "../server-process.js";
import { type Answered, type Asked, VllmEngine } from "./programs.mjs";

const LIFE_MS = 600_000;
const HEARTBEATS = ["mq_timeout=5", "heartbeat_interval=1"];
const SIZES = ["--memory", "1GiB", "--chunk-size", "256"];
/** What each engine is asked, in turn. */
const PROMPTS: Asked[] = [
	{ tokens: 1500, seed: 1, generate: 8 },
	{ tokens: 1500, seed: 2, generate: 8 },
	{ tokens: 1500, seed: 1, tail: 500, generate: 8 }, // 1,000 tokens are the first one's
	{ tokens: 700, seed: 3, generate: 8, salt: "tenant" },
	{ tokens: 700, seed: 3, generate: 8, salt: "another" },
	{ tokens: 700, seed: 3, generate: 8 },
];

async function lifeOf(port: number | string, prompts = PROMPTS): Promise<Answered[]> {
	await using engine = await VllmEngine.start(port, ...HEARTBEATS);
	const answers: Answered[] = [];
	for (const asked of prompts) {
		answers.push(await engine.ask({ ...asked, reset: true })); // what it has itself is not asked for
	}
	return answers;
}

describe("vLLM with LMCacheMPConnector", () => {
	let server: ServerProcess;
	let computed: Answered[];

	beforeAll(async () => {
		server = await ServerProcess.start(...SIZES);
		// By an engine of the same settings, each for a tenant that has stored nothing. Without a connector vLLM itself
		// computes otherwise: of the first prompt's answer, from the third token on.
		await using empty = await ServerProcess.start(...SIZES);
		const apart = PROMPTS.map((asked, at) => ({ ...asked, salt: `tenant ${at}` }));
		computed = await lifeOf(empty.port, apart);
		expect(computed.map(({ cached }) => cached)).toEqual([0, 0, 0, 0, 0, 0]);
	}, LIFE_MS);

	afterAll(() => server?.[Symbol.asyncDispose]());

	it(
		"says the same from our cache as it computes, in the engine that stores and in the next one",
		async () => {
			const tokens = (answers: Answered[]) => answers.map(({ tokens }) => tokens);
			const cached = (answers: Answered[]) => answers.map(({ cached }) => cached);
			const first = await lifeOf(server.port);
			expect(tokens(first)).toEqual(tokens(computed));
			// The third prompt's first 1,000 tokens are the first's: three chunks.
			expect(cached(first)).toEqual([0, 0, 768, 0, 0, 0]);
			const second = await lifeOf(server.port);
			expect(tokens(second)).toEqual(tokens(computed));
			expect(cached(second)).toEqual([1280, 1280, 1280, 512, 512, 512]);
			const client = await Client.connect({ url: server.url });
			await expect
				.poll(() => client.status(), { timeout: 10_000 })
				.toMatchObject({ leases: 0, slots_writing: 0, slots_reading: 0, dropped_messages: 0 });
			await client.close();
		},
		LIFE_MS,
	);

	it(
		"lives on when the server is killed, and hits again when it is back",
		async () => {
			const port = await freePort();
			let mortal = await ServerProcess.start(...SIZES, "--port", String(port));
			try {
				await using engine = await VllmEngine.start(port, ...HEARTBEATS);
				const asked = { tokens: 700, seed: 11, generate: 2, reset: true };
				const cold = await engine.ask(asked);
				expect((await engine.ask(asked)).cached).toBe(512);
				await mortal.kill();
				// The heartbeat has to have noticed: a store that nobody answers ends vLLM's engine, by its own code.
				const unhealthy = () =>
					engine.log.some((line) => /unhealthy|ping.*(fail|time)/i.test(line));
				await expect.poll(unhealthy, { timeout: 30_000, interval: 200 }).toBe(true);
				const alone = await engine.ask(asked);
				expect(alone).toMatchObject({ cached: 0, tokens: cold.tokens });
				mortal = await ServerProcess.start(...SIZES, "--port", String(port));
				const again = async () => (await engine.ask(asked)).cached;
				await expect.poll(again, { timeout: 60_000, interval: 500 }).toBe(512);
				expect((await engine.ask(asked)).tokens).toEqual(cold.tokens);
			} finally {
				await mortal[Symbol.asyncDispose]();
			}
		},
		LIFE_MS,
	);

	it(
		"goes on at once when the server was started anew and does not know it",
		async () => {
			const port = await freePort();
			let mortal = await ServerProcess.start(...SIZES, "--port", String(port));
			try {
				await using engine = await VllmEngine.start(port, "mq_timeout=20", "heartbeat_interval=10");
				const asked = { tokens: 700, seed: 12, generate: 2, reset: true };
				const cold = await engine.ask(asked);
				await mortal.kill();
				mortal = await ServerProcess.start(...SIZES, "--port", String(port));
				// Before any heartbeat: lookup, prepare_store for an instance that nobody has registered.
				const next = await engine.ask({ ...asked, seed: 13 });
				expect(next.cached).toBe(0);
				expect((await engine.ask(asked)).tokens).toEqual(cold.tokens);
			} finally {
				await mortal[Symbol.asyncDispose]();
			}
		},
		LIFE_MS,
	);
});
