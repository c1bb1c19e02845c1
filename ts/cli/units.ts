/** Bytes as people read them: exact where the unit divides them. */
export function size(bytes: number): string {
	const units = ["B", "KiB", "MiB", "GiB", "TiB"];
	const unit = Math.min(units.length - 1, Math.floor(Math.log2(Math.max(bytes, 1)) / 10));
	const value = bytes / 2 ** (10 * unit);
	return `${Number.isInteger(value) ? value : value.toFixed(1)} ${units[unit]}`;
}

/** Cells in columns: the first to the left, the others to the right. */
export function columns(rows: readonly (readonly string[])[]): string {
	const widths = (rows[0] ?? []).map((_, at) =>
		Math.max(...rows.map((row) => row[at]?.length ?? 0)),
	);
	const line = (row: readonly string[]) =>
		row
			.map((cell, at) => (at === 0 ? cell.padEnd(widths[at] ?? 0) : cell.padStart(widths[at] ?? 0)))
			.join("  ");
	return rows.map((row) => `${line(row)}\n`).join("");
}
