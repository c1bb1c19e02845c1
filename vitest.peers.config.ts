import { defineConfig } from "vitest/config";

export default defineConfig({
	test: {
		include: ["test/peers/**/*.peers.ts"],
		pool: "forks",
		fileParallelism: false, // each program wants the whole machine
		testTimeout: 60_000,
		hookTimeout: 600_000,
		reporters: ["verbose"],
	},
});
