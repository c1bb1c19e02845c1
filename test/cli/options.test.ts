import { describe, expect, it } from "vitest";
import { clientOptions, serveOptions } from "../../ts/cli/options.js";

describe("kvferry serve", () => {
	it("has the documented defaults", () => {
		expect(serveOptions([])).toEqual({
			host: "127.0.0.1",
			port: 5555,
			chunkSize: 256,
			memory: 4 * 2 ** 30,
			json: false,
		});
	});

	it("takes each flag", () => {
		const flags = "--host localhost --port 0 --chunk-size 16 --memory 1.5MiB --shm-name a --json";
		expect(serveOptions(flags.split(" "))).toEqual({
			host: "localhost",
			port: 0,
			chunkSize: 16,
			memory: 1_572_864,
			shmName: "a",
			json: true,
		});
	});

	it.each(["127.0.0.1", "127.9.9.9", "::1", "0:0:0:0:0:0:0:1", "localhost"])(
		"serves on loopback: %s",
		(host) => {
			expect(serveOptions(["--host", host]).host).toBe(host);
		},
	);

	it.each(["0.0.0.0", "10.0.0.1", "::", "::2", "127.0.0.1.example.org", ""])(
		"refuses another host: %j",
		(host) => {
			expect(() => serveOptions(["--host", host])).toThrow(
				expect.objectContaining({ code: "UNSUPPORTED_OPTION" }),
			);
		},
	);

	it.each(["http-port", "disk", "disk-size", "remote", "policy", "config"])(
		"names the later flag --%s",
		(flag) => {
			expect(() => serveOptions([`--${flag}`, "1"])).toThrow(
				expect.objectContaining({
					code: "UNSUPPORTED_OPTION",
					message: expect.stringContaining(`--${flag}`),
				}),
			);
		},
	);

	it.each([
		["--port", "65536"],
		["--port", "-1"],
		["--port", "5.5"],
		["--chunk-size", "0"],
		["--memory", "4GB"],
		["--memory", "0"],
		["--memory", "9999999TiB"],
		["--memory", ""],
		["--nonsense", "1"],
	])("refuses %s %s and names it", (flag, value) => {
		expect(() => serveOptions([`${flag}=${value}`])).toThrow(
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
