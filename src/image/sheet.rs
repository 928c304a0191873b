//! Many pictures as one: cells side by side, without borders, black where there is none; and as a PNG file that is made
//! row by row, while the rest is being drawn.

use super::Picture;
use super::png::{Lines, chunk, header};

/// How cells are laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Grid {
    pub columns: usize,
    pub rows: usize,
}

impl Grid {
    /// As many rows as `count` cells need.
    pub fn with_columns(columns: usize, count: usize) -> Self {
        let columns = columns.clamp(1, count.max(1));
        Self {
            columns,
            rows: count.max(1).div_ceil(columns),
        }
    }

    /// As square as can be, rather wider than high.
    pub fn square(count: usize) -> Self {
        let mut columns = count.isqrt();
        if columns * columns < count {
            columns += 1;
        }
        Self::with_columns(columns, count)
    }
}

/// Puts cells of one size into the grid, row by row.
pub fn assemble(grid: Grid, cells: &[Picture]) -> Picture {
    let Some(first) = cells.first() else {
        return Picture::black(1, 1, 1);
    };
    let (width, height, channels) = (first.width, first.height, first.channels);
    let mut sheet = Picture::black(grid.columns * width, grid.rows * height, channels);
    let stride = sheet.width * channels;
    for (i, cell) in cells.iter().enumerate() {
        let (column, row) = (i % grid.columns, i / grid.columns);
        for y in 0..height {
            let start = (row * height + y) * stride + column * width * channels;
            sheet.pixels[start..start + width * channels].copy_from_slice(cell.row(y));
        }
    }
    sheet
}

/// What a sheet's file looks like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sheet {
    pub grid: Grid,
    /// Height and width of a cell.
    pub size: usize,
    pub channels: usize,
    /// Each pixel becomes a square of this many pixels.
    pub scale: usize,
}

/// Makes a sheet's PNG file, a row of cells at a time.
pub struct SheetEncoder {
    sheet: Sheet,
    /// None after the last row.
    lines: Option<Lines>,
    rows_left: usize,
}

impl SheetEncoder {
    /// Also the first bytes of the file.
    pub fn new(sheet: Sheet) -> (Self, Vec<u8>) {
        let (cell, grid) = (sheet.size * sheet.scale, sheet.grid);
        let width = grid.columns * cell;
        let encoder = Self {
            sheet,
            lines: Some(Lines::new(width, sheet.channels)),
            rows_left: grid.rows,
        };
        (encoder, header(width, grid.rows * cell, sheet.channels))
    }

    /// The next row of cells, the missing ones black: bytes of the file from which a decoder can show it. With the last
    /// row the file is complete, and what comes after is passed over.
    pub fn row(&mut self, cells: &[Picture]) -> Vec<u8> {
        let Sheet {
            grid,
            size,
            channels,
            scale,
        } = self.sheet;
        let mut file = Vec::new();
        let Some(mut lines) = self.lines.take() else {
            return file;
        };
        let one = Grid {
            columns: grid.columns,
            rows: 1,
        };
        let mut row = assemble(one, cells);
        if cells.is_empty() {
            row = Picture::black(grid.columns * size, size, channels);
        }
        lines.add(&enlarge(&row, scale).pixels);
        self.rows_left -= 1;
        if self.rows_left == 0 {
            chunk(&mut file, b"IDAT", &lines.finish());
            chunk(&mut file, b"IEND", &[]);
        } else {
            chunk(&mut file, b"IDAT", &lines.flush());
            self.lines = Some(lines);
        }
        file
    }
}

/// A sheet's whole PNG file: the bytes that [`SheetEncoder`] gives out.
pub fn encode_sheet(sheet: Sheet, cells: &[Picture]) -> Vec<u8> {
    let (mut encoder, mut file) = SheetEncoder::new(sheet);
    for row in cells.chunks(sheet.grid.columns) {
        file.extend(encoder.row(row));
    }
    file
}

/// Each pixel becomes a square of `scale` x `scale`.
pub fn enlarge(picture: &Picture, scale: usize) -> Picture {
    let mut pixels = Vec::with_capacity(picture.pixels.len() * scale * scale);
    for y in 0..picture.height {
        let start = pixels.len();
        for pixel in picture.row(y).chunks_exact(picture.channels) {
            for _ in 0..scale {
                pixels.extend_from_slice(pixel);
            }
        }
        let end = pixels.len();
        for _ in 1..scale {
            pixels.extend_from_within(start..end);
        }
    }
    Picture {
        width: picture.width * scale,
        height: picture.height * scale,
        channels: picture.channels,
        pixels,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filled(value: u8) -> Picture {
        Picture {
            width: 2,
            height: 1,
            channels: 1,
            pixels: vec![value, value + 1],
        }
    }

    #[test]
    fn cells_lie_row_by_row_and_the_rest_is_black() {
        let sheet = assemble(
            Grid::with_columns(2, 3),
            &[filled(10), filled(20), filled(30)],
        );
        assert_eq!((sheet.width, sheet.height), (4, 2));
        assert_eq!(sheet.pixels, [10, 11, 20, 21, 30, 31, 0, 0]);
    }

    #[test]
    fn pixels_become_squares() {
        assert_eq!(enlarge(&filled(1), 2).pixels, [1, 1, 2, 2, 1, 1, 2, 2]);
        assert_eq!(enlarge(&filled(1), 1), filled(1));
    }

    #[test]
    fn a_file_made_row_by_row_shows_each_row_as_soon_as_it_is_there() {
        let sheet = Sheet {
            grid: Grid::with_columns(2, 5),
            size: 4,
            channels: 1,
            scale: 3,
        };
        let cells: Vec<Picture> = (1..=5)
            .map(|i| Picture {
                width: 4,
                height: 4,
                channels: 1,
                pixels: (0..16).map(|p| p * i).collect(),
            })
            .collect();
        let whole = enlarge(&assemble(sheet.grid, &cells), 3);
        let (mut encoder, mut file) = SheetEncoder::new(sheet);
        for (row, cells) in cells.chunks(2).enumerate() {
            file.extend(encoder.row(cells));
            // A decoder that has no more than this shows all lines up to here.
            let mut reader = png::Decoder::new(std::io::Cursor::new(&file))
                .read_info()
                .unwrap();
            for y in 0..(row + 1) * 12 {
                let line = reader.next_row().unwrap().unwrap();
                assert_eq!(line.data(), whole.row(y), "row {row}, line {y}");
            }
        }
        assert_eq!(file, encode_sheet(sheet, &cells));
    }

    #[test]
    fn grids_hold_every_cell() {
        for count in 1..200 {
            let grid = Grid::square(count);
            assert!(
                grid.columns * grid.rows >= count && grid.columns >= grid.rows,
                "{count}: {grid:?}"
            );
            assert!(
                grid.columns * (grid.rows - 1) < count,
                "no empty row: {count}: {grid:?}"
            );
        }
        assert_eq!(
            Grid::with_columns(10, 4),
            Grid {
                columns: 4,
                rows: 1
            }
        );
    }
}
