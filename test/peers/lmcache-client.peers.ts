// LMCache's own conformance run against our server.

import { describe, expect, it } from "vitest";
import { ServerProcess } from "../server-process.js";
import { lmcache } from "./programs.mjs";

describe("lmcache bench server", () => {
	it.each(["engine_driven", "lmcache_driven"])(
		"passes in the mode %s",
		async (mode) => {
			const port = 18_000 + (process.pid % 1000);
			await using server = await ServerProcess.start(
				...["--memory", "1GiB", "--chunk-size", "256", "--http-port", String(port)],
			);
			const requests = ["--start", "0", "--end", "8", "--interval", "0"];
			const urls = ["--rpc-url", server.url, "--url", `http://127.0.0.1:${port}`];
			const kind = ["--mode", "cpu", "--transfer-mode", mode];
			const told = await lmcache("bench", "server", ...kind, ...urls, ...requests);
			process.stdout.write(told);
			const count = (line: RegExp) => told.match(line)?.length ?? 0;
			expect(count(/cold\] STORE: stored \(512 tokens/g)).toBe(8);
			expect(count(/warm\] LOOKUP: 2\/2 chunks hit/g)).toBe(8);
			expect(count(/warm\] RETRIEVE: retrieved \(512 tokens/g)).toBe(8);
			// In the other mode it asks the server for checksums of the engine's memory, which ours does not serve.
			expect(count(/CHECKSUM MATCH OK/g)).toBe(mode === "engine_driven" ? 8 : 0);
		},
		300_000,
	);
});
