// The tarballs as a user gets them: installed offline into an empty project, with no Rust in sight.

import { execFileSync, spawnSync } from "node:child_process";
import {
	accessSync,
	constants,
	existsSync,
	mkdtempSync,
	readFileSync,
	rmSync,
	writeFileSync,
} from "node:fs";
import { homedir, tmpdir } from "node:os";
import { delimiter, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { afterAll, beforeAll, describe, expect, it } from "vitest";
import { addonOf, simulatorRoot } from "../../scripts/simulator-build.mjs";

const root = fileURLToPath(new URL("../..", import.meta.url));
const PLATFORM = "linux-x64-gnu";
const GLIBC_MAX = "2.28"; // the floor of Node's own builds

const project = mkdtempSync(join(tmpdir(), "kvferry-package-"));
const env = { ...process.env, PATH: pathWithoutRust(), npm_config_loglevel: "error" };
let tarballs: string[] = [];

beforeAll(() => {
	const output = execFileSync(process.execPath, ["scripts/pack.mjs"], {
		cwd: root,
		encoding: "utf8",
		stdio: ["ignore", "pipe", "pipe"],
	});
	tarballs = output.trim().split("\n");
	writeFileSync(join(project, "package.json"), '{ "name": "empty", "private": true }\n');
	const files = tarballs.map((tarball) => `file:${tarball}`);
	execFileSync("npm", ["install", "--offline", "--no-audit", "--no-fund", ...files], {
		cwd: project,
		env,
		stdio: ["ignore", "pipe", "pipe"],
	});
});

afterAll(() => rmSync(project, { recursive: true, force: true }));

describe("the tarballs", () => {
	it("hold what is meant to ship, and nothing else", () => {
		const [main = "", platform = ""] = tarballs;
		const allowed =
			/^package\/(package\.json|[A-Z]+\.md|LICENSE|docs\/[\w-]+\.md|deploy\/[\w.-]+|dist\/[\w./-]+\.(js|cjs|d\.ts|d\.cts))$/;
		const files = list(main);
		expect(files.filter((file) => !allowed.test(file))).toEqual([]);
		for (const entry of ["index", "engines/llama-cpp", "engines/onnx"]) {
			for (const kind of ["js", "cjs", "d.ts", "d.cts"]) {
				expect(files).toContain(`package/dist/${entry}.${kind}`);
			}
		}
		expect(files).toContain("package/dist/cli/main.js");
		expect(list(platform).sort()).toEqual([
			"package/LICENSE",
			`package/kvferry.${PLATFORM}.node`,
			"package/package.json",
		]);
	});

	it("hold what the README links to", () => {
		const links = [...read("node_modules/kvferry/README.md").matchAll(/\]\((?!https?:)([^)#]+)/g)];
		expect(links.length).toBeGreaterThan(5);
		const lost = links.filter(
			([, path = ""]) => !existsSync(join(project, "node_modules/kvferry", path)),
		);
		expect(lost.map(([, path]) => path)).toEqual([]);
	});

	it("ship no deliberate defect, which the simulator's build has", () => {
		const marker = "kvferry: this build has deliberate defects";
		const simulator = readFileSync(addonOf(simulatorRoot));
		expect(simulator.includes(marker)).toBe(true);
		const shipped = readFileSync(
			join(project, `node_modules/@kvferry/${PLATFORM}/kvferry.${PLATFORM}.node`),
		);
		expect(shipped.includes(marker)).toBe(false);
		expect(shipped.includes("simulatorDefect")).toBe(false);
	});

	it("bring no other package with them", () => {
		const { dependencies = {} } = JSON.parse(read("node_modules/kvferry/package.json"));
		expect(dependencies).toEqual({});
	});
});

describe("the binary", () => {
	const path = () => join(project, `node_modules/@kvferry/${PLATFORM}/kvferry.${PLATFORM}.node`);

	it(`needs no glibc above ${GLIBC_MAX}`, () => {
		const versions = glibcVersions(readFileSync(path()));
		expect(versions.length).toBeGreaterThan(0);
		const tooNew = versions.filter((version) => compareVersions(version, GLIBC_MAX) > 0);
		expect(tooNew).toEqual([]);
	});

	it("holds no path of the machine that built it", () => {
		const bytes = readFileSync(path());
		for (const directory of [homedir(), root]) {
			expect(bytes.includes(`${directory}/`), directory).toBe(false);
		}
	});
});

describe("in an empty project", () => {
	it("import works", () => {
		write(
			"esm.mjs",
			`import { chunkHashes } from "kvferry";
			import { LlamaPrefixCache } from "kvferry/llama-cpp";
			import { OnnxPrefixCache } from "kvferry/onnx";
			console.log(typeof LlamaPrefixCache, typeof OnnxPrefixCache);
			console.log(chunkHashes(new Uint32Array(512)).length);`,
		);
		expect(node("esm.mjs")).toBe("function function\n2\n");
	});

	it("require works", () => {
		write(
			"cjs.cjs",
			`const { chunkHashes } = require("kvferry");
			const { LlamaPrefixCache } = require("kvferry/llama-cpp");
			const { OnnxPrefixCache } = require("kvferry/onnx");
			console.log(typeof LlamaPrefixCache, typeof OnnxPrefixCache);
			console.log(chunkHashes(new Uint32Array(512)).length);`,
		);
		expect(node("cjs.cjs")).toBe("function function\n2\n");
	});

	it("both module systems work together, in the main thread and in workers", () => {
		write(
			"both.mjs",
			`import { createRequire } from "node:module";
			import { isMainThread, Worker } from "node:worker_threads";
			import * as esm from "kvferry";
			const cjs = createRequire(import.meta.url)("kvferry");
			for (const [ours, theirs] of [[esm, cjs], [cjs, esm]]) {
				try {
					ours.chunkHashes(new Uint32Array(512), { chunkSize: 0 });
				} catch (error) {
					console.log(error instanceof theirs.KvferryError, error.code);
				}
			}
			for (let round = 0; isMainThread && round < 2; round++) {
				await new Promise((resolve) =>
					new Worker(new URL(import.meta.url)).once("exit", resolve));
			}`,
		);
		expect(node("both.mjs")).toBe("true INVALID_ARGUMENT\n".repeat(6));
	});

	it.each([
		["with Node's", ["--typeRoots", join(root, "node_modules/@types"), "--types", "node"]],
		["with no other", ["--typeRoots", join(project, "none")]],
	])("types hold, for both module systems, %s types", (_, types) => {
		const source = `import { Client, KvferryError, type ErrorCode } from "kvferry";
			export const code: ErrorCode = new KvferryError("CLOSED", "").code;
			export const client: AsyncDisposable & Promise<unknown> = Client.connect() as never;
			// @ts-expect-error: no such code
			new KvferryError("NONSENSE", "");`;
		write("types.mts", source);
		write("types.cts", source);
		const tsc = join(root, "node_modules/typescript/bin/tsc");
		const flags = ["--noEmit", "--strict", "--target", "es2022", "--module", "nodenext"];
		const { status, stdout } = spawnSync(
			process.execPath,
			[tsc, ...flags, ...types, "types.mts", "types.cts"],
			{ cwd: project, encoding: "utf8" },
		);
		expect(stdout).toBe("");
		expect(status).toBe(0);
	});

	it("npx kvferry tells its version", () => {
		const { version } = JSON.parse(read("node_modules/kvferry/package.json"));
		expect(npx("--version")).toMatchObject({ status: 0, stdout: `${version}\n` });
	});

	it("npx kvferry ping says that nobody answers", () => {
		const { status, stderr } = npx("ping", "--url", "tcp://127.0.0.1:1", "--json");
		expect(status).toBe(1);
		expect(JSON.parse(stderr).code).toBe("UNREACHABLE");
	});
});

describe("without a binary", () => {
	it("import succeeds and the first native call names the platform and the remedy", () => {
		rmSync(join(project, "node_modules/@kvferry"), { recursive: true });
		write(
			"bare.mjs",
			`import { chunkHashes } from "kvferry";
			try {
				chunkHashes(new Uint32Array(512));
			} catch (error) {
				console.log(error.name, error.code, error.message);
			}`,
		);
		expect(node("bare.mjs")).toMatch(
			/^KvferryError UNSUPPORTED_PLATFORM .*linux.*x64.*gnu.*is missing.*npm install/,
		);
	});
});

function list(tarball: string): string[] {
	const names = execFileSync("tar", ["-tzf", tarball], { encoding: "utf8" });
	return names.trim().split("\n");
}

function read(path: string): string {
	return readFileSync(join(project, path), "utf8");
}

function write(path: string, text: string): void {
	writeFileSync(join(project, path), text);
}

function node(script: string): string {
	return execFileSync(process.execPath, [script], { cwd: project, env, encoding: "utf8" });
}

function npx(...args: string[]) {
	return spawnSync("npx", ["--no-install", "kvferry", ...args], {
		cwd: project,
		env,
		encoding: "utf8",
	});
}

/** Node's own folder comes first, and every folder with Rust in it is left out. */
function pathWithoutRust(): string {
	const folders = [dirname(process.execPath), ...(process.env.PATH ?? "").split(delimiter)];
	return folders
		.filter((folder) => !["cargo", "rustc"].some((tool) => runs(folder, tool)))
		.join(delimiter);
}

function runs(folder: string, tool: string): boolean {
	try {
		accessSync(join(folder, tool), constants.X_OK);
		return true;
	} catch {
		return false;
	}
}

/** The versions of glibc that an ELF file asks for, by the names in its string table. */
function glibcVersions(elf: Buffer): string[] {
	return [...elf.toString("latin1").matchAll(/\0GLIBC_(\d+(?:\.\d+)+)(?=\0)/g)].map(
		(match) => match[1] ?? "",
	);
}

function compareVersions(left: string, right: string): number {
	const [a, b] = [left, right].map((version) => version.split(".").map(Number));
	return (
		(a ?? []).map((part, i) => part - (b?.[i] ?? 0)).find((difference) => difference !== 0) ?? 0
	);
}
