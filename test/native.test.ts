import { createRequire } from "node:module";
import { Worker } from "node:worker_threads";
import { describe, expect, it } from "vitest";
import { currentPlatform, loadBinding, native, platformName } from "../ts/native.js";

const require = createRequire(import.meta.url);

describe("the addon", () => {
	it("is loaded once", () => {
		expect(native()).toBe(native());
	});

	it("loads in a worker, more than once, and survives the worker's end", async () => {
		native();
		const path = require.resolve(`../kvferry.${platformName(currentPlatform())}.node`);
		for (let round = 0; round < 2; round++) {
			const worker = new Worker("require(process.env.ADDON)", {
				eval: true,
				env: { ADDON: path },
			});
			const code = await new Promise((resolve, reject) => {
				worker.once("exit", resolve).once("error", reject);
			});
			expect(code).toBe(0);
		}
		expect(require(path)).toBe(native());
	});
});

describe("a platform without a binary", () => {
	it("is named, with the remedy", () => {
		const sunos = { os: "sunos", arch: "x64" };
		expect(() => loadBinding(sunos, require)).toThrow(
			expect.objectContaining({
				code: "UNSUPPORTED_PLATFORM",
				message: expect.stringMatching(
					/sunos.*x64.*@kvferry\/sunos-x64\) is missing.*npm install.*rustup/,
				),
			}),
		);
	});

	it("names its C library on Linux", () => {
		const musl = { os: "linux", arch: "riscv64", libc: "musl" } as const;
		expect(() => loadBinding(musl, require)).toThrow(/linux.*riscv64.*musl/);
	});

	it("is named also where the package cannot find itself, as in a bundle", () => {
		const missing = (id: string) => {
			throw Object.assign(new Error(id), { code: "MODULE_NOT_FOUND" });
		};
		const bundled = Object.assign(missing, { resolve: missing }) as unknown as NodeJS.Require;
		expect(() => loadBinding({ os: "linux", arch: "x64", libc: "gnu" }, bundled)).toThrow(
			expect.objectContaining({ code: "UNSUPPORTED_PLATFORM" }),
		);
	});

	it("tells why a binary that is there does not load", () => {
		const broken = Object.assign(
			(id: string) => {
				throw id.startsWith("@kvferry/")
					? new Error("version `GLIBC_2.28' not found")
					: Object.assign(new Error(id), { code: "MODULE_NOT_FOUND" });
			},
			{ resolve: require.resolve },
		) as unknown as NodeJS.Require;
		expect(() => loadBinding({ os: "linux", arch: "x64", libc: "gnu" }, broken)).toThrow(
			/cannot be loaded \(version `GLIBC_2.28' not found\)/,
		);
	});
});

it("names platforms as their packages are named", () => {
	expect(platformName({ os: "linux", arch: "x64", libc: "gnu" })).toBe("linux-x64-gnu");
	expect(platformName({ os: "darwin", arch: "arm64" })).toBe("darwin-arm64");
	expect(platformName({ os: "win32", arch: "x64" })).toBe("win32-x64-msvc");
});
