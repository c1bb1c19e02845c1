// The platforms that a release has binaries for. Only linux-x64-gnu is built and tested by CI.

import { fail } from "./setup.mjs";

/**
 * @typedef {{ name: string, target: string, os: string, cpu: string, libc?: string }} Platform
 * `name` is the suffix of the platform package, `target` Rust's name for it, and the rest is
 * what npm selects by.
 */

/** @type {readonly Platform[]} */
export const platforms = [
	{
		name: "linux-x64-gnu",
		target: "x86_64-unknown-linux-gnu",
		os: "linux",
		cpu: "x64",
		libc: "glibc",
	},
	{
		name: "linux-arm64-gnu",
		target: "aarch64-unknown-linux-gnu",
		os: "linux",
		cpu: "arm64",
		libc: "glibc",
	},
	{
		name: "linux-x64-musl",
		target: "x86_64-unknown-linux-musl",
		os: "linux",
		cpu: "x64",
		libc: "musl",
	},
	{
		name: "linux-arm64-musl",
		target: "aarch64-unknown-linux-musl",
		os: "linux",
		cpu: "arm64",
		libc: "musl",
	},
	{ name: "darwin-x64", target: "x86_64-apple-darwin", os: "darwin", cpu: "x64" },
	{ name: "darwin-arm64", target: "aarch64-apple-darwin", os: "darwin", cpu: "arm64" },
	{ name: "win32-x64-msvc", target: "x86_64-pc-windows-msvc", os: "win32", cpu: "x64" },
];

/** Rust's name for this machine. */
export function hostTarget() {
	const report = /** @type {{ header: { glibcVersionRuntime?: string } }} */ (
		process.platform === "linux" ? process.report.getReport() : { header: {} }
	);
	const libc =
		process.platform !== "linux" ? undefined : report.header.glibcVersionRuntime ? "glibc" : "musl";
	const found = platforms.find(
		({ os, cpu, libc: wanted }) =>
			os === process.platform && cpu === process.arch && wanted === libc,
	);
	return found?.target ?? fail(`kvferry does not build on ${process.platform}-${process.arch}`);
}
