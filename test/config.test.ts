import { describe, expect, expectTypeOf, it, vi } from "vitest";
import { createConnector, type OffloadingOptions, resolveOffloading } from "../ts/config.js";
import { KvferryError } from "../ts/errors.js";

// Whatever loads the addon or opens a socket fails in this file.
vi.mock("../ts/native.js", () => {
	throw new Error("the addon was wanted");
});
vi.mock("node:net", () => {
	throw new Error("sockets were wanted");
});

const GIB = 2 ** 30;

function refusal(options: object): string {
	try {
		resolveOffloading(options);
	} catch (error) {
		expect(error).toBeInstanceOf(KvferryError);
		expect((error as KvferryError).code).toBe("INVALID_ARGUMENT");
		return (error as KvferryError).message;
	}
	throw new Error("nothing was thrown");
}

/** LMCache offloading with these extra keys. */
const lmcache = (kvConnectorExtraConfig: Record<string, unknown> = {}) =>
	resolveOffloading({
		kvOffloadingSize: 4,
		kvOffloadingBackend: "lmcache",
		kvTransferConfig: { kvConnectorExtraConfig },
	});

describe("resolveOffloading", () => {
	it("needs neither the addon nor a socket", async () => {
		expect(resolveOffloading().kvTransferConfig).toBeNull();
		await expect(import("../ts/hash.js")).rejects.toThrow(/mock/); // what needs the addon does fail here
	});

	it("is off without a size, and leaves another connector alone", () => {
		for (const kvOffloadingSize of [undefined, null]) {
			expect(resolveOffloading({ kvOffloadingSize })).toMatchObject({
				kvTransferConfig: null,
				isKvTransferInstance: false,
				isKvProducer: false,
				isKvConsumer: false,
			});
			const kvTransferConfig = { kvConnector: "NixlConnector", kvRole: "kv_producer" } as const;
			expect(resolveOffloading({ kvOffloadingSize, kvTransferConfig })).toMatchObject({
				kvTransferConfig: { ...kvTransferConfig, kvLoadFailurePolicy: "fail" },
				isKvProducer: true,
				isKvConsumer: false,
				serverAddress: null,
				warnings: [],
			});
		}
	});

	it("does not pass the size on to LMCache: it only switches offloading on", () => {
		expect(lmcache().kvTransferConfig?.kvConnectorExtraConfig).toEqual({});
		expect(lmcache({ a: [1] }).kvTransferConfig?.kvConnectorExtraConfig).toEqual({ a: [1] });
		expect(lmcache().warnings).toEqual([]);
	});

	it("does not choose the old in-process connector for LMCache", () => {
		for (const kvConnector of [null, "LMCacheConnectorV1"]) {
			const kvTransferConfig = { kvConnector, kvRole: "kv_both" } as const;
			expect(
				resolveOffloading({ kvOffloadingSize: 4, kvOffloadingBackend: "lmcache", kvTransferConfig })
					.kvTransferConfig,
			).toMatchObject({ kvConnector: "LMCacheMPConnector", kvRole: "kv_both" });
		}
	});

	it("keeps the size in total: native memory is not shared out to ranks", () => {
		for (const tensorParallelSize of [1, 2, 8]) {
			const { kvTransferConfig } = resolveOffloading({ kvOffloadingSize: 1.5, tensorParallelSize });
			expect(kvTransferConfig).toMatchObject({
				kvConnector: "OffloadingConnector",
				kvConnectorExtraConfig: { cpu_bytes_to_use: 1.5 * GIB },
			});
		}
	});

	it("both loads and stores whenever a size is set, whatever the role was, and says what it replaced", () => {
		for (const kvOffloadingBackend of ["native", "lmcache"] as const) {
			const resolved = resolveOffloading({
				kvOffloadingSize: 4,
				kvOffloadingBackend,
				kvTransferConfig: { kvConnector: "NixlConnector", kvRole: "kv_consumer" },
			});
			expect(resolved.kvTransferConfig?.kvRole).toBe("kv_both");
			expect(resolved).toMatchObject({ isKvProducer: true, isKvConsumer: true });
			expect(resolved.warnings).toEqual([expect.stringContaining('"NixlConnector"')]);
		}
	});

	it("keeps the keys of a capacity that the server sets, with one warning", () => {
		const extra = { "lmcache.local_cpu": true, "lmcache.max_local_cpu_size": 5, other: 1 };
		const given = lmcache(extra);
		expect(given.kvTransferConfig?.kvConnectorExtraConfig).toEqual(extra);
		expect(given.warnings).toHaveLength(1);
		expect(given.warnings[0]).toMatch(
			/lmcache\.local_cpu and lmcache\.max_local_cpu_size.*localhost:5555 sets its capacity/,
		);
		expect(lmcache({ "lmcache.local_cpu": false }).warnings).toHaveLength(1);
		// The in-process connector does read them.
		const inProcess = { kvConnector: "LMCacheConnectorV1", kvRole: "kv_both" } as const;
		const kvTransferConfig = { ...inProcess, kvConnectorExtraConfig: extra };
		expect(resolveOffloading({ kvTransferConfig }).warnings).toEqual([]);
	});

	it("takes the server's address from host and port", () => {
		expect(lmcache().serverAddress).toBe("tcp://localhost:5555");
		for (const [host, port, address] of [
			["tcp://h", 6667, "tcp://h:6667"],
			["127.0.0.1", "6667", "tcp://127.0.0.1:6667"],
			["[::1]", undefined, "tcp://[::1]:5555"],
			[undefined, 1, "tcp://localhost:1"],
		]) {
			const extra = { "lmcache.mp.host": host, "lmcache.mp.port": port };
			expect(lmcache(extra).serverAddress).toBe(address);
			// A connector that was configured by name has one too.
			const kvTransferConfig = {
				kvConnector: "LMCacheMPConnector",
				kvRole: "kv_both",
				kvConnectorExtraConfig: extra,
			} as const;
			expect(resolveOffloading({ kvTransferConfig }).serverAddress).toBe(address);
		}
		expect(resolveOffloading({ kvOffloadingSize: 4 }).serverAddress).toBeNull();
		const several = lmcache({ "lmcache.mp.server_urls": "tcp://a:1,tcp://b:1" });
		expect(several.warnings).toEqual([expect.stringContaining("server_urls is not read")]);
	});

	it("refuses addresses that are none", () => {
		const refused = (host: unknown, port: unknown) =>
			refusal({
				kvOffloadingSize: 1,
				kvOffloadingBackend: "lmcache",
				kvTransferConfig: {
					kvConnectorExtraConfig: { "lmcache.mp.host": host, "lmcache.mp.port": port },
				},
			});
		for (const host of ["", "tcp://", "tcp://h:6667", "::1", "h/x", "a b", 7, null]) {
			expect(refused(host, 5555)).toMatch(/lmcache\.mp\.host is/);
		}
		for (const port of [0, 65_536, 1.5, "", "5555x", null]) {
			expect(refused("h", port)).toMatch(/lmcache\.mp\.port is/);
		}
	});

	it("refuses hidden states with chunked prefill, even when off", () => {
		const kvTransferConfig = {
			kvConnector: "ExampleHiddenStatesConnector",
			kvRole: "kv_producer",
		} as const;
		for (const kvOffloadingSize of [undefined, 4]) {
			const options = { kvOffloadingSize, kvTransferConfig };
			expect(refusal({ ...options, enableChunkedPrefill: true })).toMatch(
				/ExampleHiddenStatesConnector.*enableChunkedPrefill/,
			);
			expect(() => resolveOffloading(options)).not.toThrow();
		}
		const other = { ...kvTransferConfig, kvConnector: "NixlConnector" };
		expect(
			resolveOffloading({ kvTransferConfig: other, enableChunkedPrefill: true }).isKvProducer,
		).toBe(true);
	});

	it("reads the flag for the simple connector as Python does", () => {
		const connector = (flag: string | undefined) =>
			resolveOffloading({ kvOffloadingSize: 1, env: { VLLM_USE_SIMPLE_KV_OFFLOAD: flag } })
				.kvTransferConfig?.kvConnector;
		for (const flag of ["1", "2", "-1", " 1 ", "1_0"]) {
			expect(connector(flag)).toBe("SimpleCPUOffloadConnector");
		}
		for (const flag of ["0", "-0", "00", undefined]) {
			expect(connector(flag)).toBe("OffloadingConnector");
		}
		for (const flag of ["", "true", "1.0", "0x1"]) {
			expect(refusal({ kvOffloadingSize: 1, env: { VLLM_USE_SIMPLE_KV_OFFLOAD: flag } })).toMatch(
				/VLLM_USE_SIMPLE_KV_OFFLOAD is/,
			);
		}
	});

	it("reads sizes from text, and warns of those that hold nothing", () => {
		const size = (kvOffloadingSize: string) => resolveOffloading({ kvOffloadingSize });
		expect(size(" 4.5e0 ").kvOffloadingSize).toBe(4.5);
		expect(size("inf").warnings).toEqual([expect.stringContaining("Infinity")]);
		expect(size("0").warnings).toEqual([expect.stringContaining("cpu_bytes_to_use is 0")]);
		for (const text of ["", " ", "abc", "4GiB", "0x10", "nan"]) {
			expect(refusal({ kvOffloadingSize: text })).toMatch(/kvOffloadingSize is ".*GiB/);
		}
	});

	it("refuses other values by name", () => {
		for (const [options, message] of [
			[{ kvOffloadingSize: Number.NaN }, /kvOffloadingSize is NaN/],
			[{ kvOffloadingSiz: 1 }, /did you mean kvOffloadingSize/],
			[{ kvOffloadingBackend: "mooncake" }, /"mooncake": it must be native or lmcache/],
			[{ kvOffloadingBackend: null }, /kvOffloadingBackend/],
			[{ tensorParallelSize: 0 }, /tensorParallelSize is 0/],
			[{ enableChunkedPrefill: 1 }, /enableChunkedPrefill/],
			[{ kvTransferConfig: [] }, /kvTransferConfig must be an object/],
			[{ kvTransferConfig: { kv_connector: "X" } }, /kvTransferConfig\.kv_connector .*camelCase/],
			[{ kvTransferConfig: { kvConnector: "X" } }, /"X" has no kvRole/],
			[{ kvTransferConfig: { kvConnector: 1, kvRole: "kv_both" } }, /kvConnector must be a string/],
			[{ kvTransferConfig: { kvRole: "bad" } }, /kvRole is "bad"/],
			[{ kvTransferConfig: { kvPort: -1 } }, /kvPort is -1/],
			[{ kvTransferConfig: { kvLoadFailurePolicy: "retry" } }, /kvLoadFailurePolicy is "retry"/],
			[{ kvTransferConfig: { kvConnectorModulePath: 1 } }, /kvConnectorModulePath/],
			[{ kvTransferConfig: { kvConnectorExtraConfig: null } }, /kvConnectorExtraConfig must be/],
		] as const) {
			expect(refusal(options)).toMatch(message);
		}
	});

	it("leaves its arguments as they were", () => {
		const options = {
			kvOffloadingSize: 4,
			kvTransferConfig: { kvRole: "kv_producer", kvConnectorExtraConfig: { cpu_bytes_to_use: 1 } },
		} as const;
		const before = structuredClone(options);
		const { kvTransferConfig } = resolveOffloading(options);
		expect(options).toEqual(before);
		expect(kvTransferConfig?.kvConnectorExtraConfig).toEqual({ cpu_bytes_to_use: 4 * GIB });
	});

	it("names its choices in its types", () => {
		expectTypeOf<{ kvOffloadingBackend: "lmcache" }>().toExtend<OffloadingOptions>();
		expectTypeOf<{ kvOffloadingBackend: "mooncake" }>().not.toExtend<OffloadingOptions>();
	});
});

describe("createConnector", () => {
	it("loads the chosen connector and no other", async () => {
		const unwanted = vi.fn();
		const connector = await createConnector(lmcache({ "lmcache.mp.port": 7 }), "engine", {
			LMCacheMPConnector: async () => async (offloading, engine: string) => ({
				to: offloading.serverAddress,
				engine,
			}),
			OffloadingConnector: unwanted,
		});
		expect(connector).toEqual({ to: "tcp://localhost:7", engine: "engine" });
		expectTypeOf(connector).toEqualTypeOf<{ to: string | null; engine: string } | undefined>();
		expect(unwanted).not.toHaveBeenCalled();
	});

	it("makes none when none is configured", async () => {
		const registry = { OffloadingConnector: vi.fn() };
		expect(await createConnector(resolveOffloading(), {}, registry)).toBeUndefined();
		expect(registry.OffloadingConnector).not.toHaveBeenCalled();
	});

	it("names the known connectors when there is no loader", async () => {
		const named = (kvConnector: string) =>
			resolveOffloading({ kvTransferConfig: { kvConnector, kvRole: "kv_both" } });
		const registry = { B: vi.fn(), A: vi.fn() };
		for (const name of ["NixlConnector", "constructor", "__proto__"]) {
			await expect(createConnector(named(name), {}, registry)).rejects.toMatchObject({
				code: "UNSUPPORTED_OPTION",
				message: expect.stringMatching(new RegExp(`"${name}".*known: A, B`)),
			});
		}
		await expect(createConnector(named("X"), { modelName: "m" })).rejects.toThrow(
			/no connector "X".*known: LMCacheMPConnector, OffloadingConnector, SimpleCPU/,
		);
	});

	it("lets a factory's own error through", async () => {
		const reason = new Error("no server at tcp://localhost:5555");
		const failing = { LMCacheMPConnector: async () => () => Promise.reject(reason) };
		await expect(createConnector(lmcache(), {}, failing)).rejects.toBe(reason);
	});
});
