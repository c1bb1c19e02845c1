import { mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, describe, expect, it } from "vitest";
import {
	findSettings,
	hidden,
	SERVE,
	type Settings,
	settingsHelp,
	settingsJson,
	settingsTable,
	valuesOf,
	variable,
} from "../../ts/cli/settings.js";
import { integer } from "../../ts/cli/values.js";

const home = mkdtempSync(join(tmpdir(), "kvferry-settings-"));
afterAll(() => rmSync(home, { recursive: true }));

function file(text: string): string {
	const name = join(home, `${Math.random()}.json`);
	writeFileSync(name, text);
	return name;
}

describe("settings", () => {
	it("come from a flag, else a variable, else the file, else the default", () => {
		const config = file('{"port": 3, "chunk-size": 32, "memory": "1MiB"}');
		const env = { KVFERRY_SERVE_PORT: "2", KVFERRY_SERVE_CHUNK_SIZE: "64", KVFERRY_SERVE_HOST: "" };
		const found = findSettings(SERVE, { port: "1" }, env, config);
		expect(valuesOf<typeof SERVE>(found)).toMatchObject({
			port: 1,
			chunkSize: 64,
			memory: 2 ** 20,
			host: "127.0.0.1",
		});
		expect(["port", "chunk-size", "memory", "host"].map((name) => found.get(name)?.place)).toEqual([
			"--port",
			"KVFERRY_SERVE_CHUNK_SIZE",
			config,
			undefined,
		]);
	});

	it("take the file from a variable", () => {
		const env = { KVFERRY_SERVE_CONFIG: file('{"port": 3}') };
		expect(findSettings(SERVE, {}, env).get("port")?.value).toBe(3);
	});

	it("may each be a variable", () => {
		const env = Object.fromEntries(
			Object.entries(SERVE).map(([name, setting]) => [
				variable(name),
				"default" in setting ? setting.default : "x",
			]),
		);
		const found = findSettings(SERVE, {}, env);
		expect([...found.values()].map(({ source }) => source)).toEqual(
			Object.keys(SERVE).map(() => "environment"),
		);
	});

	it.each([
		["an unknown variable", { KVFERRY_SERVE_PROT: "1" }, "{}", /SERVE_PROT .*KVFERRY_SERVE_PORT\?/],
		["a value of a variable", { KVFERRY_SERVE_PORT: "x" }, "{}", /^KVFERRY_SERVE_PORT=x: .*65535/],
		["an unknown key", {}, '{"prot": 1}', /\.json: prot .*port\?/],
		["a name of JavaScript's", {}, '{"httpPort": 1}', /httpPort .*http-port\?/],
		["an inherited name", {}, '{"constructor": 1}', /constructor is no setting/],
		["a value of the file", {}, '{"port": -1}', /\.json: port -1: .*65535/],
		[
			"a value of the file that a variable overrides",
			{ KVFERRY_SERVE_PORT: "1" },
			'{"port": "x"}',
			/port x/,
		],
		["a list", {}, '{"port": [1]}', /\.json: port takes a text/],
		["nothing", {}, '{"port": null}', /\.json: port takes a text/],
		[
			"a key that comes twice",
			{},
			'{"port": 1, "host": "port\\":", "port": 2}',
			/port comes twice/,
		],
		["a comment", {}, "{} // no", /\.json: .*without comments/],
		["no object", {}, "[]", /\.json: give a JSON object/],
	])("refuse %s and say what is right", (_, env, text, says) => {
		expect(() => findSettings(SERVE, {}, env, file(text))).toThrow(
			expect.objectContaining({ code: "INVALID_ARGUMENT", message: expect.stringMatching(says) }),
		);
	});

	it("name a file that is not there, is none or is too large", () => {
		const read = (name: string) => () => findSettings(SERVE, {}, {}, name);
		expect(read(join(home, "gone"))).toThrow(
			expect.objectContaining({ code: "SYSTEM", message: expect.stringContaining("gone") }),
		);
		expect(read(home)).toThrow(/give a file/);
		expect(read(file(" ".repeat(65_537)))).toThrow(/65536 bytes at most/);
	});

	it("say which file it is that a variable names", () => {
		const env = { KVFERRY_SERVE_CONFIG: join(home, "gone") };
		expect(() => findSettings(SERVE, {}, env)).toThrow(/^KVFERRY_SERVE_CONFIG \/.*gone: ENOENT/);
	});

	it.each([
		["redis://s3cret@h:1/0", "redis://(hidden)@h:1/0"],
		["redis://h:1/0?password=s3cret&prefix=a", "redis://h:1/0?password=(hidden)&prefix=a"],
		["s3://b/p?region=r&secret=s3cret", "s3://b/p?region=r&secret=(hidden)"],
		["s3://b?endpoint=https://h", "s3://b?endpoint=https://h"],
		["s3://b?endpoint=https%3A%2F%2Fs3cret%40h", "s3://b?endpoint=(hidden)"],
		["s3://b?endpoint=https://me:s3cret@h", "s3://(hidden)@h"],
		["/var/cache/a@b?c=d", "/var/cache/a@b?c=d"],
	])("show no credentials of %s", (text, shown) => {
		expect(hidden(text)).toBe(shown);
	});

	it("leave other variables to others", () => {
		const env = { KVFERRY_PORT: "tcp://10.0.0.1:5555", KVFERRY_COPY_THREADS: "2" };
		expect(findSettings(SERVE, {}, env).get("port")?.value).toBe(5555);
	});

	it("show no secret, neither in what they print nor in an error", () => {
		const table: Settings = {
			token: { value: "TOKEN", help: "", secret: true, read: (given) => integer(given, 0, 9_999) },
			remote: { value: "URL", help: "", read: ({ text }) => text },
			open: { help: "open to all", read: ({ text }) => text === "true" },
		};
		const flags = { token: "4711", remote: "redis://me:4711@host/0", open: true };
		const found = findSettings(table, flags, {});
		expect(found.get("open")?.value).toBe(true);
		const shown = settingsTable(table, found) + JSON.stringify(settingsJson(table, found));
		expect(shown).not.toContain("4711");
		expect(shown).toContain("redis://(hidden)@host/0");
		const odd = findSettings(table, { remote: "redis://me:47@1/1@host/0" }, {});
		expect(settingsTable(table, odd)).toContain("redis://(hidden)@host/0");
		expect(() => findSettings(table, { token: "47x11" }, {})).toThrow(/^--token: give an integer/);
		const picky: Settings = {
			remote: { value: "URL", help: "", read: (given) => integer(given, 0, 1) },
		};
		const env = { KVFERRY_SERVE_REMOTE: "redis://me:4711@host" };
		expect(() => findSettings(picky, {}, env)).toThrow(/=redis:\/\/\(hidden\)@host: give/);
		expect(settingsHelp(table)).toMatch(/--open +open to all/);
	});
});

describe("docs/operators.md", () => {
	it("has each setting with its variable and its default", () => {
		const guide = readFileSync(new URL("../../docs/operators.md", import.meta.url), "utf8");
		const rows = [...guide.matchAll(/^\| `--([a-z-]+)[^|]*\| `(KVFERRY_SERVE_\w+)` \| (.*?) \|/gm)];
		expect(rows.map(([, name, variable, byDefault]) => [name, variable, byDefault])).toEqual(
			Object.entries(SERVE).map(([name, setting]) => [
				name,
				variable(name),
				"default" in setting ? setting.default : "",
			]),
		);
	});
});
