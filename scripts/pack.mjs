// Packs the npm packages into .cache/pack: kvferry itself, and one package for each binary found
// beside package.json. What is packed is staged first, so that only what is listed here ships.

import { cpSync, existsSync, mkdirSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { platforms } from "./platforms.mjs";
import { cache, fail, root, run, step } from "./setup.mjs";

const manifest = JSON.parse(readFileSync(join(root, "package.json"), "utf8"));
const out = join(cache, "pack");

/** Packs everything that was built, and returns the tarballs' paths, kvferry's first. */
export function pack() {
	rmSync(out, { recursive: true, force: true });
	const built = platforms.filter(({ name }) => existsSync(join(root, binary(name))));
	if (built.length === 0 || !existsSync(join(root, "dist"))) {
		fail("nothing to pack: run `npm run build` first");
	}
	step(`npm pack: kvferry and ${built.map(({ name }) => `@kvferry/${name}`).join(", ")}`);
	return [packMain(), ...built.map(packPlatform)];
}

function packMain() {
	const { devDependencies: _dev, scripts: _scripts, napi: _napi, ...published } = manifest;
	const optionalDependencies = Object.fromEntries(
		platforms.map(({ name }) => [`@kvferry/${name}`, manifest.version]),
	);
	return packStaged("kvferry", { ...published, optionalDependencies }, manifest.files);
}

function packPlatform(/** @type {import("./platforms.mjs").Platform} */ platform) {
	const { name, target, os, cpu, libc } = platform;
	const published = {
		name: `@kvferry/${name}`,
		version: manifest.version,
		description: `kvferry's binary for ${target}`,
		license: manifest.license,
		main: binary(name),
		files: [binary(name), "LICENSE"],
		os: [os],
		cpu: [cpu],
		...(libc === undefined ? {} : { libc: [libc] }),
		engines: manifest.engines,
	};
	return packStaged(`kvferry-${name}`, published, published.files);
}

function packStaged(
	/** @type {string} */ name,
	/** @type {object} */ published,
	/** @type {string[]} */ files,
) {
	const stage = join(out, name);
	mkdirSync(stage, { recursive: true });
	writeFileSync(join(stage, "package.json"), `${JSON.stringify(published, null, 2)}\n`);
	const staged = files.filter((file) => !file.startsWith("!")); // npm leaves out of them what these say
	for (const file of staged) {
		cpSync(join(root, file), join(stage, file), { recursive: true });
	}
	run("npm", ["pack", "--silent", "--pack-destination", out], { cwd: stage });
	return join(out, `${name}-${manifest.version}.tgz`);
}

function binary(/** @type {string} */ name) {
	return `kvferry.${name}.node`;
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
	for (const tarball of pack()) {
		console.log(tarball);
	}
}
