//! PNG, 8 bits a channel, grey or RGB.

use super::Picture;
use png::{BitDepth, ColorType, Compression, Encoder};

/// A complete PNG file.
pub fn encode(picture: &Picture) -> Vec<u8> {
    let mut file = Vec::with_capacity(picture.pixels.len() / 2 + 128);
    // Sizes are ours and never 0, and a Vec takes every write: none of the three can fail.
    let mut encoder = Encoder::new(&mut file, picture.width as u32, picture.height as u32);
    encoder.set_color(if picture.channels == 1 {
        ColorType::Grayscale
    } else {
        ColorType::Rgb
    });
    encoder.set_depth(BitDepth::Eight);
    encoder.set_compression(Compression::Fast);
    let mut writer = encoder
        .write_header()
        .expect("a header is written to memory");
    writer
        .write_image_data(&picture.pixels)
        .expect("pixels are written to memory");
    writer.finish().expect("an end is written to memory");
    file
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pixels_come_back() {
        for channels in [1, 3] {
            let pixels: Vec<u8> = (0..28 * 12 * channels)
                .map(|i| (i * 37 % 251) as u8)
                .collect();
            let picture = Picture {
                width: 28,
                height: 12,
                channels,
                pixels,
            };
            let file = encode(&picture);
            let mut reader = png::Decoder::new(std::io::Cursor::new(&file))
                .read_info()
                .unwrap();
            let mut back = vec![0; reader.output_buffer_size().unwrap()];
            let info = reader.next_frame(&mut back).unwrap();
            assert_eq!(
                (info.width, info.height, info.bit_depth),
                (28, 12, BitDepth::Eight)
            );
            assert_eq!(back[..info.buffer_size()], picture.pixels);
        }
    }
}
