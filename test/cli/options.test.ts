import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { describe, expect, it } from "vitest";
import {
	benchOptions,
	clientOptions,
	doctorOptions,
	quotaOptions,
	replayOptions,
	serveOptions,
} from "../../ts/cli/options.js";

describe("kvferry serve", () => {
	const settings = (...args: string[]) => serveOptions(args, {}).settings;

	it("has the documented defaults", () => {
		expect(serveOptions([], {})).toMatchObject({ printConfig: false, json: false });
		expect(settings()).toEqual({
			host: "127.0.0.1",
			port: 5555,
			httpPort: 8080,
			chunkSize: 256,
			memory: 4 * 2 ** 30,
			policy: "default",
			diskSize: 20 * 2 ** 30,
			listenPublic: false,
			log: "text",
		});
	});

	it("takes each flag", () => {
		const flags =
			"--host localhost --port 0 --http-port 0 --chunk-size 16 --memory 1.5MiB --shm-name a --policy s3fifo --disk /d " +
			"--disk-size 1GiB --remote redis://h/1 --quotas /q --listen-public --token-file /t --ipc /i --log json --json --print-config";
		expect(serveOptions(flags.split(" "), {})).toMatchObject({ printConfig: true, json: true });
		expect(settings(...flags.split(" "))).toEqual({
			host: "localhost",
			port: 0,
			httpPort: 0,
			chunkSize: 16,
			memory: 1_572_864,
			shmName: "a",
			policy: "s3fifo",
			disk: "/d",
			diskSize: 2 ** 30,
			remote: "redis://h/1",
			quotas: "/q",
			listenPublic: true,
			tokenFile: "/t",
			ipc: "/i",
			log: "json",
		});
	});

	it.each(["127.0.0.1", "127.9.9.9", "::1", "0:0:0:0:0:0:0:1", "localhost"])(
		"serves on loopback: %s",
		(host) => {
			expect(settings("--host", host).host).toBe(host);
		},
	);

	it.each(["0.0.0.0", "10.0.0.1", "::", "::2", "127.0.0.1.example.org"])(
		"refuses another host: %j",
		(host) => {
			expect(() => settings("--host", host)).toThrow(
				expect.objectContaining({ code: "UNSUPPORTED_OPTION" }),
			);
		},
	);

	it("serves on other addresses with the flag and the file of tokens, and not with one of them", () => {
		const host = ["--host", "0.0.0.0"];
		const [flag, file] = [["--listen-public"], ["--token-file", "t"]];
		expect(settings(...host, ...flag, ...file).host).toBe("0.0.0.0");
		for (const args of [
			[...host, ...flag],
			[...host, ...file],
			["--host", "example.org", ...flag, ...file],
		]) {
			expect(() => settings(...args)).toThrow(/--listen-public and --token-file FILE/);
		}
	});

	it("serves no HTTP where it is off", () => {
		expect(settings("--http-port", "off")).not.toHaveProperty("httpPort");
	});

	it("names the flag that was meant", () => {
		expect(() => settings("--htp-port", "1")).toThrow(/--htp-port .*did you mean --http-port\?/);
		expect(() => settings("--mem", "1GiB")).toThrow(/--mem .*did you mean --memory\?/);
	});

	it("refuses a flag that is given twice", () => {
		expect(() => settings("--port", "1", "--port=0")).toThrow(/^--port is given twice/);
		expect(settings("--port", "1", "--port", "1").port).toBe(1);
		expect(() => quotaOptions(["set", "--salt=a", "--salt=b"])).toThrow(/^--salt is given twice/);
	});

	it("says of a size that has no unit how small it is", () => {
		expect(() => settings("--memory", "4")).toThrow(/--memory 4 is 4 bytes: .*4096.*GiB/);
		expect(() => settings("--disk-size", "20")).toThrow(/--disk-size 20 is 20 bytes: .*8192/);
		expect(settings("--memory", "4096", "--disk", "d", "--disk-size", "8192")).toMatchObject({
			memory: 4096,
			diskSize: 8192,
		});
	});

	it.each(["--disk", "--remote", "--quotas", "--host", "--token-file"])(
		"refuses an empty %s, of a variable that is missing",
		(flag) => {
			expect(() => settings(flag, "")).toThrow(new RegExp(`^${flag} is empty`));
		},
	);

	it("refuses the size of a disk that is not given", () => {
		expect(() => settings("--disk-size", "1GiB")).toThrow(/^--disk-size 1GiB .*--disk DIR/);
	});

	it("names the setting of a file or a variable that has no use or may not be", () => {
		const home = mkdtempSync(join(tmpdir(), "kvferry-options-"));
		try {
			const config = join(home, "kvferry.json");
			writeFileSync(config, '{"disk-size":"1GiB"}');
			expect(() => settings("--config", config)).toThrow(
				/^\/.*kvferry\.json: disk-size 1GiB has no use here/,
			);
			writeFileSync(config, '{"host":"0.0.0.0"}');
			expect(() => settings("--config", config)).toThrow(
				/^\/.*kvferry\.json: host 0\.0\.0\.0 is not a loopback address/,
			);
			expect(() => serveOptions([], { KVFERRY_SERVE_HOST: "0.0.0.0" })).toThrow(
				/^KVFERRY_SERVE_HOST=0\.0\.0\.0 is not/,
			);
		} finally {
			rmSync(home, { recursive: true });
		}
	});

	it.each([
		["--port", "65536"],
		["--port", "-1"],
		["--port", "5.5"],
		["--http-port", "65536"],
		["--http-port", "none"],
		["--http-port", ""],
		["--chunk-size", "0"],
		["--memory", "4GB"],
		["--memory", "0"],
		["--memory", "9999999TiB"],
		["--memory", "17TiB"],
		["--memory", ""],
		["--disk-size", "lots"],
		["--policy", "fifo"],
		["--log", "xml"],
		["--nonsense", "1"],
	])("refuses %s %s and names it", (flag, value) => {
		expect(() => settings(`${flag}=${value}`)).toThrow(
			expect.objectContaining({
				code: "INVALID_ARGUMENT",
				message: expect.stringContaining(flag),
			}),
		);
	});
});

describe("kvferry ping and status", () => {
	it("ask the default server, for at most 3 s", () => {
		expect(clientOptions([])).toEqual({
			url: "tcp://127.0.0.1:5555",
			timeoutMs: 3000,
			json: false,
		});
	});

	it("refuse a deadline of nothing", () => {
		expect(() => clientOptions(["--timeout-ms", "0"])).toThrow(/--timeout-ms 0/);
	});
});

describe("kvferry doctor", () => {
	it("examines the default server when nothing is given", () => {
		expect(doctorOptions([])).toEqual({
			url: "tcp://127.0.0.1:5555",
			timeoutMs: 3000,
			json: false,
		});
	});

	it("takes each flag", () => {
		const flags =
			"--server localhost:1 --timeout-ms 9 --tokens f --model m --world-size 8 --salt s " +
			"--chunk-size 16 --hash-algorithm sha256_cbor --hash-seed 7 --json";
		expect(doctorOptions(flags.split(" "))).toEqual({
			url: "localhost:1",
			timeoutMs: 9,
			prompt: { file: "f", modelName: "m", kvWorldSize: 8, cacheSalt: "s" },
			chunkSize: 16,
			hashAlgorithm: "sha256_cbor",
			hashSeed: "7",
			json: true,
		});
	});

	it("is told the server as the other commands are, too", () => {
		expect(doctorOptions(["--url", "localhost:1"])).toHaveProperty("url", "localhost:1");
		expect(() => doctorOptions(["--url=a:1", "--server=b:1"])).toThrow(
			/--url a:1 and --server b:1/,
		);
	});

	it("names a PrefixCache's model by its identity", () => {
		const { prompt } = doctorOptions(["--tokens", "f", "--identity", "abc"]);
		expect(prompt).toEqual({
			file: "f",
			modelName: "kvferry/ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
			kvWorldSize: 1,
			cacheSalt: "",
		});
	});

	it.each([
		["--tokens", ["--tokens=f"]],
		["--model", ["--model=m"]],
		["--identity", ["--identity=i"]],
		["--salt", ["--salt=s"]],
		["--world-size", ["--world-size=2"]],
		["--identity", ["--tokens=f", "--model=m", "--identity=i"]],
		["--world-size", ["--tokens=f", "--identity=i", "--world-size=2"]],
		["--world-size", ["--tokens=f", "--model=m", "--world-size=256"]],
		["--identity is empty", ["--tokens=f", "--identity="]],
		["--model is empty", ["--tokens=f", "--model="]],
		["--chunk-size", ["--chunk-size=0"]],
		["--timeout-ms", ["--timeout-ms=x"]],
	])("refuses a %s that has no use", (flag, args) => {
		expect(() => doctorOptions(args)).toThrow(
			expect.objectContaining({
				code: "INVALID_ARGUMENT",
				message: expect.stringContaining(flag),
			}),
		);
	});
});

describe("kvferry quota", () => {
	const common = { http: new URL("http://127.0.0.1:8080"), timeoutMs: 3000, json: false };

	it("lists where nothing else is said", () => {
		expect(quotaOptions([])).toEqual({ action: "list", ...common });
	});

	it("takes each flag", () => {
		const flags =
			"set --salt s --cap 1.5MiB --guarantee 0 --http http://localhost:1 --timeout-ms 9 --json";
		expect(quotaOptions(flags.split(" "))).toEqual({
			action: "set",
			salt: "s",
			cap: 1_572_864,
			guarantee: 0,
			http: new URL("http://localhost:1"),
			timeoutMs: 9,
			json: true,
		});
		expect(quotaOptions(["set", "--default"])).toEqual({ action: "set", ...common });
		expect(quotaOptions(["unset", "--salt", ""])).toEqual({ action: "unset", salt: "", ...common });
	});

	it.each([
		["another action", ["get"], "set or unset"],
		["two", ["set", "unset"], "set or unset"],
		["nobody", ["set"], "--salt SALT or --default"],
		["both", ["set", "--salt=a", "--default"], "--salt SALT or --default"],
		["nobody to unset", ["unset"], "--salt"],
		["an end of the default", ["unset", "--default", "--salt=a"], "--default"],
		["a cap of a list", ["--cap=1"], "--cap"],
		["a guarantee to unset", ["unset", "--salt=a", "--guarantee=1"], "--guarantee"],
		["a salt of a list", ["--salt=a"], "--salt"],
		["a size that is none", ["set", "--default", "--cap=lots"], "--cap"],
		["another protocol", ["--http=tcp://127.0.0.1:5555"], "--http"],
	])("refuses %s", (_, args, named) => {
		expect(() => quotaOptions(args)).toThrow(
			expect.objectContaining({
				code: "INVALID_ARGUMENT",
				message: expect.stringContaining(named),
			}),
		);
	});
});

describe("kvferry bench", () => {
	it("takes each flag", () => {
		expect(benchOptions([])).toEqual({
			http: new URL("http://127.0.0.1:8080"),
			bytes: 2 ** 28,
			chunkBytes: 2 ** 20,
			timeoutMs: 3000,
			json: false,
		});
		const flags =
			"--url a:1 --http http://b:2 --size 1GiB --chunk-bytes 4KiB --timeout-ms 9 --json";
		expect(benchOptions(flags.split(" "))).toEqual({
			url: "a:1",
			http: new URL("http://b:2"),
			bytes: 2 ** 30,
			chunkBytes: 4096,
			timeoutMs: 9,
			json: true,
		});
	});

	it.each([
		["more than is meant", ["--size=5GiB"], "--size 5GiB: give 4GiB at most"],
		["chunks without room for a prompt", ["--chunk-bytes=17MiB"], "--chunk-bytes 17MiB"],
		["an HTTP address of no server", ["--http=http://b:2"], "--url"],
	])("refuses %s", (_, args, named) => {
		expect(() => benchOptions(args)).toThrow(
			expect.objectContaining({
				code: "INVALID_ARGUMENT",
				message: expect.stringContaining(named),
			}),
		);
	});
});

describe("a flag of another command", () => {
	it.each([
		["quota --url", () => quotaOptions(["--url", "tcp://a:1"]), "--http"],
		["ping --port", () => clientOptions(["--port", "1"]), "--url"],
	])("is answered with all that there are, and no guess: %s", (_, parse, flag) => {
		expect(parse).toThrow(/is no flag here: there are --/);
		expect(parse).toThrow(flag);
	});
});

describe("kvferry replay", () => {
	it("takes a file, a capacity and a policy", () => {
		expect(replayOptions(["a.jsonl", "--capacity", "10"])).toEqual({
			file: "a.jsonl",
			capacity: 10,
			policy: "default",
			json: false,
		});
		const flags = "- --capacity 5 --policy lru --json".split(" ");
		expect(replayOptions(flags)).toEqual({ file: "-", capacity: 5, policy: "lru", json: true });
	});

	it.each([
		["no file", ["--capacity", "10"], "FILE"],
		["two files", ["a", "b", "--capacity", "10"], "FILE"],
		["no capacity", ["a"], "--capacity"],
		["no room", ["a", "--capacity", "0"], "--capacity"],
		["another policy", ["a", "--capacity", "1", "--policy", "belady"], "default, lru, arc, s3fifo"],
	])("refuses %s and says what is missing", (_, args, named) => {
		expect(() => replayOptions(args)).toThrow(
			expect.objectContaining({
				code: "INVALID_ARGUMENT",
				message: expect.stringContaining(named),
			}),
		);
	});
});
