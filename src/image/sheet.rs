//! Many pictures as one: cells side by side, without borders, black where there is none.

use super::Picture;

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
