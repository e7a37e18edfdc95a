"""What a frozen backbone's patch tokens say of every pixel: segmentation and regression by heads on them."""
